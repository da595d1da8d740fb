// Attention over packed keys and values with an online softmax (arXiv 1805.02867).
//
// A task is some query rows of one key head and a range of its keys. Per tile of keys: dot
// products, softmax weights, weighted values added up. Two classes do the products: for many rows,
// here, a tile is decoded once into memory; for few, in row_attention.h, codes go into registers
// only.
#pragma once

#include <math.h>

#include "products.h"

namespace LEVEL {

// exp(x) for x <= 0, to about one unit in the last place; 0 below -87.3, NaN for NaN.
static INLINE F exp_negative(F x) {
    const F lowest = Vector::set1(-87.3365f);
    const F inside = Vector::max(lowest, x);
    const I n = Vector::round(Vector::mul(inside, Vector::set1(1.44269504f)));
    const F power = Vector::convert(n);
    F r = Vector::fma(power, Vector::set1(-0.693359375f), inside);
    r = Vector::fma(power, Vector::set1(2.12194440e-4f), r);
    F p = Vector::set1(1.9875691500e-4f);  // Cephes expf
    p = Vector::fma(p, r, Vector::set1(1.3981999507e-3f));
    p = Vector::fma(p, r, Vector::set1(8.3334519073e-3f));
    p = Vector::fma(p, r, Vector::set1(4.1665795894e-2f));
    p = Vector::fma(p, r, Vector::set1(1.6666665459e-1f));
    p = Vector::fma(p, r, Vector::set1(5.0000001201e-1f));
    p = Vector::fma(Vector::mul(p, r), r, Vector::add(r, Vector::set1(1.0f)));
    const I exponent = Vector::shift_left<23>(Vector::iadd(n, Vector::iset1(127)));
    const F result = Vector::mul(p, Vector::floats(exponent));
    return Vector::select(Vector::greater(lowest, x), Vector::zero(), result);
}

struct Softmax {
    float *maximum, *mass;
};

// Mask `logits` of one query row from key `first` on: -inf, or the bias added.
static INLINE void apply_mask(const AttentionArgs &a, int64_t batch, int64_t head, int64_t query,
                              int64_t first, int64_t count, float *logits) {
    if (a.mask) {
        const uint8_t *mask = a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1]
                            + query * a.mask_strides[2];
        if (a.mask_is_bool) {
            for (int64_t i = 0; i < count; i++)
                logits[i] = mask[first + i] ? logits[i] : -INFINITY;
        } else {
            const float *bias = (const float *)mask + first;
            for (int64_t i = 0; i < count; i++) logits[i] += bias[i];
        }
    }
    if (a.is_causal) {
        for (int64_t i = query < first ? 0 : query - first + 1; i < count; i++)
            logits[i] = -INFINITY;
    }
}

// Turn `VECTORS` vectors of logits of row r into weights exp(logit - maximum), in place. Returns
// what sums of earlier weights are to be multiplied by.
template <int VECTORS>
static INLINE float weigh(const Softmax &state, int64_t r, float *logits) {
    F top = Vector::load(logits);
    for (int w = 1; w < VECTORS; w++) top = Vector::max(Vector::load(logits + w * LANES), top);
    const float before = state.maximum[r], now = Vector::maximum(top);
    const float maximum = now > before ? now : before;
    const float reference = maximum == -INFINITY ? 0 : maximum;
    float correction = 1;
    if (maximum != before) {
        correction = expf(before - reference);
        state.maximum[r] = maximum;
        state.mass[r] *= correction;
    }
    F mass = Vector::zero();
    for (int w = 0; w < VECTORS; w++) {
        const F difference = Vector::sub(Vector::load(logits + w * LANES), Vector::set1(reference));
        const F weight = exp_negative(difference);
        Vector::store(logits + w * LANES, weight);
        mass = Vector::add(mass, weight);
    }
    state.mass[r] += Vector::sum(mass);
    return correction;
}

// Products of many rows. Lanes are keys, so nothing is transposed but codes; the sums over lanes
// are taken once at the end.
struct TileProducts {
    static constexpr int VECTORS = WIDE, TILE = WIDE * LANES, ROWS_AT_MOST = ATTENTION_ROWS;
    const AttentionArgs &a;
    float *values, *sums;
    uint32_t *dwords;

    TileProducts(const AttentionArgs &args, Scratch &scratch) : a(args) {
        const Layout &k = *a.k_layout, &v = *a.v_layout;
        values = scratch.take<float>((int64_t)(k.dim > v.dim ? k.dim : v.dim) * TILE);
        dwords = scratch.take<uint32_t>((int64_t)(k.dwords > v.dwords ? k.dwords : v.dwords)
                                        * LANES);
        sums = scratch.take<float>(ATTENTION_ROWS * (int64_t)v.dim * LANES);
    }
    static size_t scratch(const Layout *k, const Layout *v) {
        const size_t dim = k->dim > v->dim ? k->dim : v->dim;
        const size_t dwords = k->dwords > v->dwords ? k->dwords : v->dwords;
        return 4 * (TILE * dim + LANES * (dwords + ATTENTION_ROWS * (size_t)v->dim)) + 512;
    }
    void clear(int64_t rows) { __builtin_memset(sums, 0, 4 * rows * a.v_layout->dim * LANES); }

    // logits[row][key] without the scales of keys.
    void dot(int64_t group, int64_t first, int64_t first_row, int64_t rows, float *logits) {
        constexpr int MAX = max_queries(WIDE);
        const Layout &k = *a.k_layout;
        const float *query = a.query + first_row * k.dim;
        prefetch_rows(a.value.rows, group, first, TILE, a.n, 4 * a.v_layout->dwords);
        decode_tile<WIDE>(k, a.key, group, first, a.n, values, dwords);
        for (int64_t q = 0; q < rows; q += MAX) {
            with_queries<MAX>(smaller(MAX, rows - q), [&](auto number)
                                  __attribute__((always_inline)) {
                constexpr int QUERIES = decltype(number)::value;
                F part[QUERIES][WIDE];
                dots<QUERIES, WIDE>(values, query + q * k.dim, k.dim, part);
                for (int i = 0; i < QUERIES * WIDE; i++)
                    Vector::store(logits + (q * WIDE + i) * LANES, (&part[0][0])[i]);
            });
        }
        prefetch_rows(a.key.rows, group, first + TILE, TILE, a.n, 4 * k.dwords);
    }
    void scale(int64_t r, int64_t rows, float factor) {
        const int64_t part = r / SUM_QUERIES * SUM_QUERIES, dim = a.v_layout->dim;
        const int64_t queries = smaller(SUM_QUERIES, rows - part);
        float *at = sums + part * dim * LANES + (r - part) * LANES;
        for (int64_t c = 0; c < dim; c++, at += queries * LANES)
            Vector::store(at, Vector::mul(Vector::load(at), Vector::set1(factor)));
    }
    void add(int64_t group, int64_t first, int64_t, int64_t rows, const float *weights) {
        decode_tile<WIDE>(*a.v_layout, a.value, group, first, a.n, values, dwords);
        accumulate_rows(values, weights, rows, a.v_layout->dim, sums);
    }
    void write(int64_t rows, float *out) { add_lanes(sums, rows, a.v_layout->dim, out); }
};

template <class Products> static size_t attention_scratch(const Layout *k, const Layout *v) {
    return Products::scratch(k, v) + 4 * Products::ROWS_AT_MOST * (Products::TILE + 2) + 512;
}

template <class Products>
static void attention(const AttentionArgs *args, int64_t begin, int64_t end, void *memory) {
    const AttentionArgs &a = *args;
    constexpr int TILE = Products::TILE, VECTORS = Products::VECTORS;
    constexpr int MAX = Products::ROWS_AT_MOST;
    const int64_t rows_in_all = a.q_per_kv * a.length, parts = (rows_in_all + MAX - 1) / MAX;
    Scratch scratch{(uint8_t *)memory};
    Products products(a, scratch);
    float *logits = scratch.take<float>(MAX * TILE);
    const Softmax state{scratch.take<float>(MAX), scratch.take<float>(MAX)};
    for (int64_t task = begin; task < end; task++) {
        const int64_t part = task % parts, group = task / parts % a.groups;
        const int64_t split = task / parts / a.groups, r0 = part * MAX;
        const int64_t rows = smaller(MAX, rows_in_all - r0);
        const int64_t batch = group / a.kv_heads, first_head = group % a.kv_heads * a.q_per_kv;
        const int64_t keys_end = smaller(a.n, (split + 1) * a.step);
        int64_t stop = keys_end;
        if (a.is_causal) {  // no row of the part sees further than its last query
            const bool wraps = r0 / a.length != (r0 + rows - 1) / a.length;
            stop = smaller(stop, wraps ? a.length : (r0 + rows - 1) % a.length + 1);
        }
        for (int64_t r = 0; r < rows; r++) state.maximum[r] = -INFINITY;
        __builtin_memset(state.mass, 0, sizeof(float) * rows);
        products.clear(rows);
        for (int64_t first = split * a.step; first < stop; first += TILE) {
            const int64_t count = smaller(TILE, keys_end - first);
            products.dot(group, first, group * rows_in_all + r0, rows, logits);
            float k_scales[TILE], v_scales[TILE];
            load_scales(a.key, group, first, count, TILE, a.scale, k_scales);
            load_scales(a.value, group, first, count, TILE, 1, v_scales);
            for (int64_t r = 0; r < rows; r++) {
                float *row = logits + r * TILE;
                const auto times = [&](const float *scales) __attribute__((always_inline)) {
                    for (int i = 0; i < TILE; i += LANES)
                        Vector::store(row + i, Vector::mul(Vector::load(row + i),
                                                           Vector::load(scales + i)));
                };
                times(k_scales);
                const int64_t head = first_head + (r0 + r) / a.length;
                apply_mask(a, batch, head, (r0 + r) % a.length, first, count, row);
                for (int64_t i = count; i < TILE; i++) row[i] = -INFINITY;
                const float correction = weigh<VECTORS>(state, r, row);
                if (correction != 1) products.scale(r, rows, correction);
                times(v_scales);
            }
            products.add(group, first, count, rows, logits);
        }
        const int64_t at = (split * a.groups + group) * rows_in_all + r0;
        for (int64_t r = 0; r < rows; r++) {
            a.maximum[at + r] = state.maximum[r];
            a.mass[at + r] = state.mass[r];
        }
        products.write(rows, a.partial + at * a.v_layout->dim);
    }
}

}  // namespace LEVEL
