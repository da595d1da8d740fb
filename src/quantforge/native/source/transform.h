// Tiles of LANES vectors, one to a lane: rotation and its inverse, and rows in and out.
#pragma once

#include "decode.h"

namespace LEVEL {

// Read LANES rows of floats (dim,) into a tile (dim, LANES).
static INLINE void load_tile(const uint8_t *const row[LANES], int64_t dim, float *tile) {
    for (int64_t begin = 0; begin < dim; begin += LANES) {
        I dword[LANES];
        load_dwords(row, begin, dim, dword);
        const int64_t end = smaller(begin + LANES, dim);
        for (int64_t c = begin; c < end; c++) Vector::istore(tile + c * LANES, dword[c - begin]);
    }
}

// Write `dwords` dwords of the first `count` lanes of a tile to rows.
static INLINE void store_tile(const void *tile, int64_t dwords, uint8_t *const row[LANES],
                              int64_t count) {
    for (int64_t begin = 0; begin < dwords; begin += LANES) {
        const int64_t part = smaller(LANES, dwords - begin);
        I dword[LANES];
        for (int64_t i = 0; i < part; i++)
            dword[i] = Vector::iload((const uint32_t *)tile + (begin + i) * LANES);
        for (int64_t i = part; i < LANES; i++) dword[i] = Vector::izero();
        Vector::transpose(dword);
        for (int64_t i = 0; i < count; i++) {
            if (part == LANES) Vector::istore(row[i] + 4 * begin, dword[i]);
            else Vector::store_some(row[i] + 4 * begin, dword[i], (int)part);
        }
    }
}

static INLINE F at(const float *tile, int64_t channel) {
    return Vector::load(tile + channel * LANES);
}

constexpr int MAX_ORDER = 28;

// One sum of a factor of the dense stage: terms (column, coefficient) added from left to right.
static INLINE F sum_of_terms(const F *x, int terms, const int16_t *&word) {
    F total = Vector::zero();
    for (int t = 0; t < terms; t++) {
        const F value = x[*word++];
        const int coefficient = *word++;
        const F term = coefficient == 1    ? value
                       : coefficient == -1 ? Vector::sub(Vector::set1(-0.0f), value)
                                           : Vector::mul(value, Vector::set1((float)coefficient));
        total = t == 0 ? term : Vector::add(total, term);
    }
    return total;
}

// The dense stage: `order` channels dim / order apart go through its factors.
static INLINE void dense_stage(float *tile, int64_t dim, const int16_t *program, int order) {
    F x[2][MAX_ORDER];
    const int64_t run = dim / order;
    for (int64_t g = 0; g < run; g++) {
        for (int j = 0; j < order; j++) x[0][j] = at(tile, j * run + g);
        const int16_t *word = program;
        const int factors = *word++;
        for (int f = 0; f < factors; f++) {
            const int rows = *word++;
            for (int i = 0; i < rows; i++) {
                const int terms = *word++;
                x[(f + 1) % 2][i] = sum_of_terms(x[f % 2], terms, word);
            }
        }
        for (int j = 0; j < order; j++)
            Vector::store(tile + (j * run + g) * LANES, x[factors % 2][j]);
    }
}

// H x in the order of additions of numerics.rotation.butterfly, or H^T x. Two stages at a time: the
// same additions with half of the loads.
static void butterfly(float *tile, int64_t dim, const Code &code, bool transpose) {
    const int64_t run = dim / code.order;
    if (code.order > 1)
        dense_stage(tile, dim, code.dense + (transpose ? code.dense[0] : 1), code.order);
    int64_t stride = 1;
    for (; 4 * stride <= run; stride *= 4) {
        for (int64_t start = 0; start < dim; start += 4 * stride) {
            for (int64_t i = start; i < start + stride; i++) {
                const F a = at(tile, i), b = at(tile, i + stride);
                const F c = at(tile, i + 2 * stride), d = at(tile, i + 3 * stride);
                const F e = Vector::add(a, b), f = Vector::sub(a, b);
                const F g = Vector::add(c, d), h = Vector::sub(c, d);
                Vector::store(tile + i * LANES, Vector::add(e, g));
                Vector::store(tile + (i + stride) * LANES, Vector::add(f, h));
                Vector::store(tile + (i + 2 * stride) * LANES, Vector::sub(e, g));
                Vector::store(tile + (i + 3 * stride) * LANES, Vector::sub(f, h));
            }
        }
    }
    if (stride < run) {
        for (int64_t start = 0; start < dim; start += 2 * stride) {
            for (int64_t i = start; i < start + stride; i++) {
                const F a = at(tile, i), b = at(tile, i + stride);
                Vector::store(tile + i * LANES, Vector::add(a, b));
                Vector::store(tile + (i + stride) * LANES, Vector::sub(a, b));
            }
        }
    }
}

static size_t rotate_scratch(int dim) { return (size_t)dim * LANES * 4 + 64; }

// out = R x, or R^T x, of contiguous rows; not bit-exact (one multiplication instead of two).
static void rotate(const RotateArgs *args, int64_t begin, int64_t end, void *memory) {
    const Code &code = *args->code;
    const int64_t dim = code.dim, row_size = 4 * dim;
    float *tile = (float *)memory;
    const int64_t zero = 0;
    const Rows x{(uint8_t *)args->x, &zero, row_size};
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *row[LANES];
        row_addresses(x, 0, t * LANES, args->n, row);
        load_tile(row, dim, tile);
        const auto scale = [&]() __attribute__((always_inline)) {
            for (int64_t c = 0; c < dim; c++) {
                const F factor = Vector::set1(code.signs[c] * code.inv_sqrt_dim);
                Vector::store(tile + c * LANES, Vector::mul(at(tile, c), factor));
            }
        };
        if (!args->inverse) scale();
        butterfly(tile, dim, code, args->inverse);
        if (args->inverse) scale();
        uint8_t *out[LANES];
        for (int64_t i = 0; i < LANES; i++)
            out[i] = (uint8_t *)args->out + (t * LANES + i) * row_size;
        store_tile(tile, dim, out, smaller(LANES, args->n - t * LANES));
    }
}

}  // namespace LEVEL
