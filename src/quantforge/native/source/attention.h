// Attention over packed keys and values with an online softmax (arXiv 1805.02867).
//
// A task is some query rows of one key head and a range of its keys. Per tile of WIDE * LANES keys:
// decode the keys once for all rows, dot products, softmax weights, decode the values into the same
// buffer, add the weighted values up. Lanes are keys all along, so nothing is transposed but codes;
// the sums over lanes are taken once at the end.
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

static size_t attention_scratch(const Layout *k, const Layout *v) {
    const size_t dim = k->dim > v->dim ? k->dim : v->dim, tile = WIDE * LANES;
    const size_t dwords = k->dwords > v->dwords ? k->dwords : v->dwords;
    return 4 * (tile * dim + dwords * LANES
                + ATTENTION_ROWS * (tile + (size_t)v->dim * LANES + 2)) + 1024;
}

struct Softmax {
    float *maximum, *mass, *sums;
    int64_t dim;
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

// Turn the logits of row `r` into weights exp(logit - maximum), in place.
static INLINE void weigh(const Softmax &state, int64_t r, int64_t rows, float *logits) {
    F top = Vector::load(logits);
    for (int w = 1; w < WIDE; w++) top = Vector::max(Vector::load(logits + w * LANES), top);
    const float before = state.maximum[r], now = Vector::maximum(top);
    const float maximum = now > before ? now : before;
    const float reference = maximum == -INFINITY ? 0 : maximum;
    if (maximum != before) {
        const float correction = expf(before - reference);
        state.maximum[r] = maximum;
        state.mass[r] *= correction;
        const int64_t part = r / SUM_QUERIES * SUM_QUERIES;
        const int64_t queries = smaller(SUM_QUERIES, rows - part);
        float *at = state.sums + part * state.dim * LANES + (r - part) * LANES;
        const F factor = Vector::set1(correction);
        for (int64_t c = 0; c < state.dim; c++, at += queries * LANES)
            Vector::store(at, Vector::mul(Vector::load(at), factor));
    }
    F mass = Vector::zero();
    for (int w = 0; w < WIDE; w++) {
        const F difference = Vector::sub(Vector::load(logits + w * LANES), Vector::set1(reference));
        const F weight = exp_negative(difference);
        Vector::store(logits + w * LANES, weight);
        mass = Vector::add(mass, weight);
    }
    state.mass[r] += Vector::sum(mass);
}

static void attention(const AttentionArgs *args, int64_t begin, int64_t end, void *memory) {
    const AttentionArgs &a = *args;
    constexpr int TILE = WIDE * LANES, MAX = max_queries(WIDE);
    const Layout &k = *a.k_layout, &v = *a.v_layout;
    const int64_t rows_in_all = a.q_per_kv * a.length;
    const int64_t parts = (rows_in_all + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    const int64_t dwords_count = k.dwords > v.dwords ? k.dwords : v.dwords;
    Scratch scratch{(uint8_t *)memory};
    float *values = scratch.take<float>((int64_t)(k.dim > v.dim ? k.dim : v.dim) * TILE);
    uint32_t *dwords = scratch.take<uint32_t>(dwords_count * LANES);
    float *logits = scratch.take<float>(ATTENTION_ROWS * TILE);
    Softmax state;
    state.dim = v.dim;
    state.maximum = scratch.take<float>(ATTENTION_ROWS);
    state.mass = scratch.take<float>(ATTENTION_ROWS);
    state.sums = scratch.take<float>(ATTENTION_ROWS * (int64_t)v.dim * LANES);
    for (int64_t task = begin; task < end; task++) {
        const int64_t part = task % parts, group = task / parts % a.groups;
        const int64_t split = task / parts / a.groups;
        const int64_t r0 = part * ATTENTION_ROWS;
        const int64_t rows = smaller(ATTENTION_ROWS, rows_in_all - r0);
        const int64_t batch = group / a.kv_heads, first_head = group % a.kv_heads * a.q_per_kv;
        const float *query = a.query + (group * rows_in_all + r0) * k.dim;
        int64_t stop = smaller(a.n, (split + 1) * a.step);
        if (a.is_causal) {  // no row of the part sees further than its last query
            const bool wraps = r0 / a.length != (r0 + rows - 1) / a.length;
            stop = smaller(stop, wraps ? a.length : (r0 + rows - 1) % a.length + 1);
        }
        for (int64_t r = 0; r < rows; r++) state.maximum[r] = -INFINITY;
        __builtin_memset(state.mass, 0, sizeof(float) * rows);
        __builtin_memset(state.sums, 0, sizeof(float) * rows * v.dim * LANES);
        for (int64_t first = split * a.step; first < stop; first += TILE) {
            const int64_t count = smaller(TILE, a.n - first);
            prefetch_rows(a.value.rows, group, first, TILE, a.n, 4 * v.dwords);
            decode_tile<WIDE>(k, a.key, group, first, a.n, values, dwords);
            float scales[TILE];
            load_scales(a.key, group, first, count, TILE, a.scale, scales);
            for (int64_t q = 0; q < rows; q += MAX) {
                with_queries<MAX>(smaller(MAX, rows - q), [&](auto number)
                                      __attribute__((always_inline)) {
                    constexpr int QUERIES = decltype(number)::value;
                    F sums[QUERIES][WIDE];
                    dots<QUERIES, WIDE>(values, query + q * k.dim, k.dim, sums);
                    for (int i = 0; i < QUERIES; i++)
                        for (int w = 0; w < WIDE; w++)
                            Vector::store(
                                logits + ((q + i) * WIDE + w) * LANES,
                                Vector::mul(sums[i][w], Vector::load(scales + w * LANES)));
                });
            }
            prefetch_rows(a.key.rows, group, first + TILE, TILE, a.n, 4 * k.dwords);
            load_scales(a.value, group, first, count, TILE, 1, scales);
            for (int64_t r = 0; r < rows; r++) {
                float *row = logits + r * TILE;
                const int64_t head = first_head + (r0 + r) / a.length;
                apply_mask(a, batch, head, (r0 + r) % a.length, first, count, row);
                for (int64_t i = count; i < TILE; i++) row[i] = -INFINITY;
                weigh(state, r, rows, row);
                for (int w = 0; w < WIDE; w++)
                    Vector::store(row + w * LANES, Vector::mul(Vector::load(row + w * LANES),
                                                               Vector::load(scales + w * LANES)));
            }
            decode_tile<WIDE>(v, a.value, group, first, a.n, values, dwords);
            accumulate_rows(values, logits, rows, v.dim, state.sums);
        }
        const int64_t at = (split * a.groups + group) * rows_in_all + r0;
        for (int64_t r = 0; r < rows; r++) {
            a.maximum[at + r] = state.maximum[r];
            a.mass[at + r] = state.mass[r];
        }
        add_lanes(state.sums, rows, v.dim, a.partial + at * v.dim);
    }
}

}  // namespace LEVEL
