// Scores and weighted sums: products of decoded tiles with queries and weights.
#pragma once

#include "decode.h"

namespace LEVEL {

// Queries per pass over a tile; tiles of one vector are for one query or two.
constexpr int max_queries(int wide) { return wide == 1 ? 2 : Vector::MAX_ACCUMULATORS / wide; }

// sums[q][w] = sum over channels of query[channel][q] * values[channel][w * LANES ..].
// A chain of additions per sum would wait for itself, so few sums are cut into several.
template <int QUERIES, int W>
static INLINE void dots(const float *values, const float *query, int64_t dim, F sums[QUERIES][W]) {
    constexpr int FREE = Vector::MAX_ACCUMULATORS / (QUERIES * W);
    constexpr int CHAINS = FREE >= 4 ? 4 : FREE >= 2 ? 2 : 1;
    F chain[CHAINS][QUERIES][W];
    unrolled<0, CHAINS * QUERIES * W>([&](auto k) __attribute__((always_inline)) {
        (&chain[0][0][0])[decltype(k)::value] = Vector::zero();
    });
    const auto step = [&](auto c, int64_t channel) __attribute__((always_inline)) {
        F x[W];
        unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
            constexpr int AT = decltype(w)::value;
            x[AT] = Vector::load(values + (channel * W + AT) * LANES);
        });
        unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
            constexpr int AT = decltype(q)::value;
            const F factor = Vector::set1(query[channel * QUERIES + AT]);
            unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
                F &sum = chain[decltype(c)::value][AT][decltype(w)::value];
                sum = Vector::fma(factor, x[decltype(w)::value], sum);
            });
        });
    };
    int64_t channel = 0;
    for (; channel + CHAINS <= dim; channel += CHAINS) {
        unrolled<0, CHAINS>([&](auto c) __attribute__((always_inline)) {
            step(c, channel + decltype(c)::value);
        });
    }
    for (; channel < dim; channel++) step(Int<0>(), channel);
    unrolled<0, QUERIES * W>([&](auto k) __attribute__((always_inline)) {
        constexpr int AT = decltype(k)::value;
        F total = (&chain[0][0][0])[AT];
        unrolled<1, CHAINS>([&](auto c) __attribute__((always_inline)) {
            total = Vector::add(total, (&chain[decltype(c)::value][0][0])[AT]);
        });
        (&sums[0][0])[AT] = total;
    });
}

// Call body(Int<count>) for the number of queries of a packed part, at most MAX.
template <int MAX, class Body> static INLINE void with_queries(int64_t count, const Body &body) {
    if constexpr (MAX > 1) {
        if (count < MAX) return with_queries<MAX - 1>(count, body);
    }
    body(Int<MAX>());
}

// Ask for the part [q, end) of `queries` of the next rows: requests in one burst fill the buffers
// of the core and then wait in front of its loads.
static INLINE void prefetch_slice(const ScoresArgs &a, int64_t group, int64_t first, int64_t rows,
                                  int64_t q, int64_t end, int64_t queries) {
    const int64_t from = rows * q / queries, to = rows * end / queries;
    prefetch_rows(a.packed.rows, group, first + from, to - from, a.n, 4 * a.layout->dwords);
}
// Ask for the memory that scores of a query will be written to.
static INLINE void prefetch_scores(const ScoresArgs &a, int64_t group, int64_t q, int64_t first,
                                   int64_t count) {
    const uint8_t *at = a.out.data + a.out.offsets[group] + q * a.out.stride + 4 * first;
    for (int64_t b = 0; b < 4 * count; b += 64) __builtin_prefetch(at + b);
}

template <int W>
static void scores_of(const ScoresArgs &a, int64_t begin, int64_t end, Scratch scratch) {
    constexpr int TILE = W * LANES, MAX = max_queries(W);
    const Layout &layout = *a.layout;
    float *values = scratch.take<float>((int64_t)layout.dim * TILE);
    uint32_t *dwords = scratch.take<uint32_t>((int64_t)layout.dwords * LANES);
    const int64_t tiles = (a.n + TILE - 1) / TILE;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * TILE;
        const int64_t count = smaller(TILE, a.n - first);
        decode_tile<W>(layout, a.packed, group, first, a.n, values, dwords);
        float scales[TILE];
        load_scales(a.packed, group, first, count, TILE, 1, scales);
        const float *query = a.query + group * a.queries * layout.dim;
        for (int64_t q = 0; q < a.queries; q += MAX) {
            with_queries<MAX>(smaller(MAX, a.queries - q), [&](auto number)
                                  __attribute__((always_inline)) {
                constexpr int QUERIES = decltype(number)::value;
                prefetch_slice(a, group, first + TILE, TILE, q, q + QUERIES, a.queries);
                for (int i = 0; i < QUERIES; i++) prefetch_scores(a, group, q + i, first, count);
                F sums[QUERIES][W];
                dots<QUERIES, W>(values, query + q * layout.dim, layout.dim, sums);
                for (int i = 0; i < QUERIES; i++) {
                    float *out = (float *)(a.out.data + a.out.offsets[group]
                                           + (q + i) * a.out.stride) + first;
                    const float offset = a.offset ? a.offset[group * a.queries + q + i] : 0;
                    for (int w = 0; w < W; w++) {
                        const int64_t left = count - w * LANES;
                        if (left <= 0) break;
                        F y = Vector::mul(sums[i][w], Vector::load(scales + w * LANES));
                        if (a.offset) y = Vector::add(y, Vector::set1(offset));
                        const int part = (int)smaller(left, LANES);
                        float *at = out + w * LANES;
                        if (a.accumulate)
                            y = Vector::add(y, Vector::floats(Vector::load_some(at, part)));
                        if (part == LANES) Vector::store(at, y);
                        else Vector::store_some(at, Vector::bits(y), part);
                    }
                }
            });
        }
    }
}

static size_t scores_scratch(const Layout *layout) {
    return (size_t)(layout->dim * 2 + layout->dwords * 4) * LANES * 4 + 512;
}

static void scores(const ScoresArgs *a, int64_t begin, int64_t end, void *scratch) {
    if (a->wide == 1) scores_of<1>(*a, begin, end, {(uint8_t *)scratch});
    else scores_of<2>(*a, begin, end, {(uint8_t *)scratch});
}

// sums[channel][q] += weights[q] * values[channel], lanes apart: they are added up at the end.
// Weights stay in registers; a sum is loaded and stored once for W multiplications.
template <int QUERIES, int W>
static INLINE void accumulate(const float *values, const float *weights, int64_t dim, float *sums) {
    F weight[QUERIES][W];
    for (int q = 0; q < QUERIES; q++)
        for (int w = 0; w < W; w++) weight[q][w] = Vector::load(weights + (q * W + w) * LANES);
    for (int64_t c = 0; c < dim; c++) {
        F x[W];
        unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
            constexpr int AT = decltype(w)::value;
            x[AT] = Vector::load(values + (c * W + AT) * LANES);
        });
        unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
            constexpr int AT = decltype(q)::value;
            float *at = sums + (c * QUERIES + AT) * LANES;
            F sum = Vector::load(at);
            unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
                constexpr int WAT = decltype(w)::value;
                sum = Vector::fma(weight[AT][WAT], x[WAT], sum);
            });
            Vector::store(at, sum);
        });
    }
}

// The weights of some queries fill half of the registers.
constexpr int SUM_QUERIES = Vector::MAX_ACCUMULATORS / 6;

// Add a tile of values to the sums of `rows` queries, in parts of SUM_QUERIES.
static void accumulate_rows(const float *values, const float *weights, int64_t rows,
                                   int64_t dim, float *sums) {
    for (int64_t q = 0; q < rows; q += SUM_QUERIES) {
        with_queries<SUM_QUERIES>(smaller(SUM_QUERIES, rows - q), [&](auto number)
                                      __attribute__((always_inline)) {
            accumulate<decltype(number)::value, WIDE>(values, weights + q * WIDE * LANES, dim,
                                                      sums + q * dim * LANES);
        });
    }
}

// Sums of `rows` queries over their lanes: out (rows, dim).
static INLINE void add_lanes(const float *sums, int64_t rows, int64_t dim, float *out) {
    for (int64_t q = 0; q < rows; q++) {
        const int64_t part = q / SUM_QUERIES * SUM_QUERIES;
        const int64_t queries = smaller(SUM_QUERIES, rows - part);
        const float *at = sums + part * dim * LANES + (q - part) * LANES;
        for (int64_t c = 0; c < dim; c++)
            out[q * dim + c] = Vector::sum(Vector::load(at + c * queries * LANES));
    }
}

static size_t combine_scratch(const Layout *layout) {
    const size_t rows = COMBINE_ROWS, tile = WIDE * LANES;
    return 4 * (tile * layout->dim + (size_t)layout->dwords * LANES
                + rows * (tile + (size_t)layout->dim * LANES)) + 512;
}

static void combine(const CombineArgs *args, int64_t begin, int64_t end, void *memory) {
    const CombineArgs &a = *args;
    const Layout &layout = *a.layout;
    constexpr int TILE = WIDE * LANES;
    const int64_t dim = layout.dim, parts = (a.queries + COMBINE_ROWS - 1) / COMBINE_ROWS;
    Scratch scratch{(uint8_t *)memory};
    float *values = scratch.take<float>(dim * TILE);
    uint32_t *dwords = scratch.take<uint32_t>((int64_t)layout.dwords * LANES);
    float *weights = scratch.take<float>(COMBINE_ROWS * TILE);
    float *sums = scratch.take<float>(COMBINE_ROWS * dim * LANES);
    for (int64_t task = begin; task < end; task++) {
        const int64_t part = task % parts, group = task / parts % a.groups;
        const int64_t split = task / parts / a.groups;
        const int64_t q0 = part * COMBINE_ROWS, rows = smaller(COMBINE_ROWS, a.queries - q0);
        const int64_t stop = smaller(a.n, (split + 1) * a.step);
        __builtin_memset(sums, 0, sizeof(float) * rows * dim * LANES);
        for (int64_t first = split * a.step; first < stop; first += TILE) {
            const int64_t count = smaller(TILE, stop - first);
            decode_tile<WIDE>(layout, a.packed, group, first, stop, values, dwords);
            float scales[TILE];
            load_scales(a.packed, group, first, count, TILE, 1, scales);
            for (int64_t q = 0; q < rows; q++) {
                const float *w = (const float *)(a.weights.data + a.weights.offsets[group]
                                                 + (q0 + q) * a.weights.stride) + first;
                for (int64_t i = 0; i < count; i++) weights[q * TILE + i] = w[i] * scales[i];
                for (int64_t i = count; i < TILE; i++) weights[q * TILE + i] = 0;
            }
            accumulate_rows(values, weights, rows, dim, sums);
        }
        add_lanes(sums, rows, dim,
                  a.partial + ((split * a.groups + group) * a.queries + q0) * dim);
    }
}

}  // namespace LEVEL
