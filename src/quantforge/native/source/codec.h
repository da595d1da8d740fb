// Quantize and dequantize, a tile of LANES vectors at a time.
//
// Quantizing repeats numerics/encode.py operation by operation: one vector is one lane, so each
// lane sees the same additions in the same order, each rounded once (no fused multiply-add: the
// compiler runs with -ffp-contract=off), and division and square root are those of IEEE 754.
#pragma once

#include "transform.h"

namespace LEVEL {

// Read one row of any dtype as float32, less the shift, times the inverse equalizer.
static INLINE void prepare_row(const uint8_t *x, int dtype, const float *shift,
                               const float *inverse, int64_t dim, float *out) {
    for (int64_t i = 0; i < dim; i++) {
        float value;
        if (dtype == FLOAT32) {
            value = ((const float *)x)[i];
        } else if (dtype == FLOAT16) {
            value = Vector::half_to_float(((const uint16_t *)x)[i]);
        } else if (dtype == BFLOAT16) {
            const uint32_t word = (uint32_t)((const uint16_t *)x)[i] << 16;
            __builtin_memcpy(&value, &word, 4);
        } else {
            value = (float)((const double *)x)[i];
        }
        if (shift) value -= shift[i];
        if (inverse) value *= inverse[i];
        out[i] = value;
    }
}

// Write one row as any dtype: equalizer * x + shift.
static INLINE void finish_row(const float *x, int dtype, const float *shift, const float *equalizer,
                              int64_t dim, uint8_t *out) {
    for (int64_t i = 0; i < dim; i++) {
        float value = x[i];
        if (equalizer) value *= equalizer[i];
        if (shift) value += shift[i];
        if (dtype == FLOAT32) {
            ((float *)out)[i] = value;
        } else if (dtype == FLOAT16) {
            ((uint16_t *)out)[i] = Vector::float_to_half(value);
        } else if (dtype == BFLOAT16) {
            uint32_t word;
            __builtin_memcpy(&word, &value, 4);
            const bool nan = value != value;
            word += 0x7FFF + (word >> 16 & 1);
            ((uint16_t *)out)[i] = nan ? 0x7FC0 : (uint16_t)(word >> 16);
        } else {
            ((double *)out)[i] = value;
        }
    }
}

static INLINE F reciprocal(F x) {  // 0 where x is 0
    const F zero = Vector::zero();
    return Vector::select(Vector::equal(x, zero), zero, Vector::div(Vector::set1(1.0f), x));
}

static INLINE int64_t half_of(int64_t n) {  // the greatest power of two below n > 1
    return (int64_t)1 << (63 - __builtin_clzll((unsigned long long)(n - 1)));
}

// Finish numerics.encode.tree_sum of n terms; the first halving is done by the caller.
static INLINE F tree_sum(float *terms, int64_t n) {
    while (n > 1) {
        const int64_t half = half_of(n);
        for (int64_t i = 0; i < n - half; i++)
            Vector::store(terms + i * LANES, Vector::add(at(terms, i), at(terms, i + half)));
        n = half;
    }
    return at(terms, 0);
}

// Sum term(0) .. term(n - 1) in the order of numerics.encode.tree_sum.
template <class Term> static INLINE F tree_sum_of(float *terms, int64_t n, const Term &term) {
    if (n == 1) return term(0);
    const int64_t half = half_of(n);
    for (int64_t i = 0; i < half; i++) {
        F value = term(i);
        if (i < n - half) value = Vector::add(value, term(i + half));
        Vector::store(terms + i * LANES, value);
    }
    return tree_sum(terms, half);
}

// The number of boundaries below u: a descent with one comparison per bit.
template <int BITS> struct Search {
    Search<BITS - 1> upper;
    Vector::Lookup<BITS == 1 ? 1 : BITS - 1> boundary;
    explicit Search(const float *levels)
        : upper(levels), boundary(levels + 128 * (BITS - 1)) {}
    INLINE I operator()(F u) const {
        const I index = upper(u);
        return Vector::descend(index, Vector::greater(u, boundary(index)));
    }
};
template <> struct Search<1> {
    F boundary;
    explicit Search(const float *levels) : boundary(Vector::set1(levels[0])) {}
    INLINE I operator()(F u) const {
        return Vector::descend(Vector::izero(), Vector::greater(u, boundary));
    }
};

struct EncodeBuffers {
    float *tile, *c, *terms;
    uint32_t *packed;
};

// Put the fields of the code of `channel` into their dwords.
static INLINE void pack_code(const Layout &layout, int64_t channel, I code, uint32_t *packed) {
    for (int p = 0; p < layout.planes; p++) {
        const Plane &plane = layout.plane[p];
        const int64_t slot = channel / plane.stride, byte = channel - slot * plane.stride;
        uint32_t *word = packed + (plane.offset + byte) / 4 * LANES;
        I field = code;
        if (layout.planes > 1)
            field = Vector::bit_and(Vector::shift_right(code, plane.shift),
                                    Vector::iset1((1 << plane.width) - 1));
        const int position = (int)(8 * (byte % 4) + plane.width * slot);
        Vector::istore(word, Vector::bit_or(Vector::iload(word),
                                            Vector::shift_left(field, position)));
    }
}

template <int BITS>
static void quantize_of(const QuantizeArgs &a, int64_t begin, int64_t end, Scratch scratch) {
    const Code &code = *a.code;
    const Layout &layout = *a.layout;
    const int64_t dim = layout.dim;
    float *tile = scratch.take<float>(dim * LANES), *c = scratch.take<float>(dim * LANES);
    float *terms = scratch.take<float>(dim * LANES), *rows = scratch.take<float>(dim * LANES);
    uint32_t *packed = scratch.take<uint32_t>((int64_t)layout.dwords * LANES);
    const Search<BITS> search(a.levels);
    const Vector::Lookup<BITS> lookup(code.centroids);
    const F one = Vector::set1(1.0f);
    const int64_t tiles = (a.n + LANES - 1) / LANES;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const int64_t count = smaller(LANES, a.n - first);
        const uint8_t *row[LANES];
        row_addresses(a.x, group, first, a.n, row);
        if (a.dtype != FLOAT32 || a.shift || a.inverse_equalizer) {
            const float *shift = a.shift ? a.shift + a.shift_offsets[group] : nullptr;
            const float *inverse =
                a.inverse_equalizer ? a.inverse_equalizer + a.equalizer_offsets[group] : nullptr;
            for (int i = 0; i < LANES; i++) {
                if (i < count) prepare_row(row[i], a.dtype, shift, inverse, dim, rows + i * dim);
                row[i] = (const uint8_t *)(rows + smaller(i, count - 1) * dim);
            }
        }
        load_tile(row, dim, tile);

        F greatest = Vector::zero();
        for (int64_t i = 0; i < dim; i++)
            greatest = Vector::max(Vector::abs(at(tile, i)), greatest);
        const I exponent = Vector::bit_and(Vector::bits(greatest), Vector::iset1(0x7F800000));
        const F ordinary = Vector::select(  // bounds of numerics.encode.ORDINARY
            Vector::greater(Vector::set1(0x1p-32f), greatest), Vector::zero(),
            Vector::select(Vector::greater(Vector::set1(0x1p32f), greatest), one, Vector::zero()));
        const F power = Vector::select(
            Vector::greater(ordinary, Vector::zero()), one,
            Vector::floats(Vector::imax(exponent, Vector::iset1(0x00800000))));
        const F inverse_power = Vector::div(one, power);
        const F norm = Vector::sqrt(tree_sum_of(terms, dim, [&](int64_t i)
                                                     __attribute__((always_inline)) {
            const F v = Vector::mul(at(tile, i), inverse_power);
            return Vector::mul(v, v);
        }));
        // A vector with NaN or infinity gets the codes of zeros; its scale says what is wrong.
        const Vector::Mask finite = Vector::greater(Vector::set1(__builtin_inff()), norm);
        const F inverse_norm = Vector::select(finite, reciprocal(norm), Vector::zero());
        for (int64_t i = 0; i < dim; i++) {
            const F v = Vector::mul(at(tile, i), inverse_power);
            const F turned = Vector::mul(Vector::select(finite, v, Vector::zero()),
                                         Vector::set1(code.signs[i]));
            Vector::store(tile + i * LANES, turned);
        }
        butterfly(tile, dim, code, false);

        __builtin_memset(packed, 0, 4 * LANES * layout.dwords);
        for (int64_t i = 0; i < dim; i++) {
            const F u = Vector::mul(at(tile, i), inverse_norm);
            const I index = search(u);
            Vector::store(tile + i * LANES, u);
            Vector::store(c + i * LANES, lookup(index));
            pack_code(layout, i, index, packed);
        }
        const auto with_c = [&](const float *other) __attribute__((always_inline)) {
            return tree_sum_of(terms, dim, [&](int64_t i) __attribute__((always_inline)) {
                return Vector::mul(at(other, i), at(c, i));
            });
        };
        const F dims = Vector::set1(code.dim_factor);
        F factor;
        if (code.scale_rule == 0) factor = Vector::mul(dims, reciprocal(with_c(tile)));
        else if (code.scale_rule == 1)
            factor = Vector::sqrt(Vector::mul(dims, reciprocal(with_c(c))));
        else factor = Vector::mul(with_c(tile), reciprocal(with_c(c)));
        F scale = Vector::mul(norm, Vector::set1(code.inv_sqrt_dim));
        scale = Vector::mul(Vector::mul(scale, factor), power);

        float scales[LANES];
        Vector::store(scales, scale);
        uint8_t *out[LANES] = {};
        for (int64_t i = 0; i < count; i++) {
            out[i] = a.packed.data + a.packed.offsets[group] + (first + i) * a.packed.stride;
            uint8_t *s = a.scales.data + a.scales.offsets[group] + (first + i) * a.scales.stride;
            if (code.wide_scales) *(float *)s = scales[i];
            else *(uint16_t *)s = Vector::float_to_half(scales[i]);
        }
        store_tile(packed, layout.dwords, out, count);
    }
}

static size_t quantize_scratch(const Layout *layout) {
    return 4 * LANES * ((size_t)layout->dim * 4 + layout->dwords) + 512;
}

static void quantize(const QuantizeArgs *a, int64_t begin, int64_t end, void *memory) {
    const Scratch scratch{(uint8_t *)memory};
    switch (a->layout->bits) {
#define CASE(BITS)                                                                               \
    case BITS: return quantize_of<BITS>(*a, begin, end, scratch);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

static size_t dequantize_scratch(const Layout *layout) {
    return 4 * LANES * ((size_t)layout->dim * 2 + layout->dwords) + 512;
}

static void dequantize(const DequantizeArgs *args, int64_t begin, int64_t end, void *memory) {
    const DequantizeArgs &a = *args;
    const Code &code = *a.packed.code;
    const Layout &layout = *a.layout;
    const int64_t dim = layout.dim;
    Scratch scratch{(uint8_t *)memory};
    float *tile = scratch.take<float>(dim * LANES), *rows = scratch.take<float>(dim * LANES);
    uint32_t *dwords = scratch.take<uint32_t>((int64_t)layout.dwords * LANES);
    const int64_t tiles = (a.n + LANES - 1) / LANES;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const int64_t count = smaller(LANES, a.n - first);
        decode_tile<1>(layout, a.packed, group, first, a.n, tile, dwords);
        float scales[LANES];
        load_scales(a.packed, group, first, count, LANES, code.inv_sqrt_dim, scales);
        const F scale = Vector::load(scales);
        for (int64_t i = 0; i < dim; i++)
            Vector::store(tile + i * LANES, Vector::mul(at(tile, i), scale));
        butterfly(tile, dim, code, true);
        for (int64_t i = 0; i < dim; i++)
            Vector::store(tile + i * LANES, Vector::mul(at(tile, i), Vector::set1(code.signs[i])));
        const bool plain = a.dtype == FLOAT32 && !a.shift && !a.equalizer;
        uint8_t *out[LANES], *target[LANES];
        for (int64_t i = 0; i < count; i++) {
            target[i] = a.out.data + a.out.offsets[group] + (first + i) * a.out.stride;
            out[i] = plain ? target[i] : (uint8_t *)(rows + i * dim);
        }
        store_tile(tile, dim, out, count);
        if (plain) continue;
        const float *shift = a.shift ? a.shift + a.shift_offsets[group] : nullptr;
        const float *equalizer = a.equalizer ? a.equalizer + a.equalizer_offsets[group] : nullptr;
        for (int64_t i = 0; i < count; i++)
            finish_row(rows + i * dim, a.dtype, shift, equalizer, dim, target[i]);
    }
}

}  // namespace LEVEL
