// Products of attention for few query rows, as in a decode step: codes go into registers only.
//
// Keys: dot products of rows as they lie (rows.h). Values: a lane is a channel, a decoded vector
// meets the weights of ROW_SUMS queries, and 4 vectors of sums for each stay in registers while a
// tile of keys goes by:
//
//     for 4 vectors of channels:   for each key:   4 lookups,  4 * queries multiplications
//
// Instructions per LANES numbers at 4 bits and 4 queries (AVX-512): keys 1/2 shift, 1 lookup,
// 4 multiplications, 1.4 to add lanes up; values 5.5.
#pragma once

#include "attention.h"
#include "rows.h"

namespace LEVEL {

constexpr int ROW_SUMS = Vector::MAX_ACCUMULATORS >= 16 ? 4 : 2;  // queries per pass over values

// sums[q] += weights[q][key] * row of each key; sums (query, width), weights (query, stride).
template <int WIDTH, int QUERIES>
static INLINE void add_rows(const Packed &packed, int64_t group, int64_t first, int64_t count,
                            int64_t n, const Layout &layout, const float *weights, int64_t stride,
                            float *sums) {
    typedef RowDecoder<WIDTH> Decoder;
    const Decoder decoder(packed.code->centroids);
    const int64_t dwords = layout.dwords, width = row_width(layout, LANES);
    const int64_t ahead = ahead_of(packed.rows, 4 * dwords), step = packed.rows.stride;
    const uint8_t *start = packed.rows.data + packed.rows.offsets[group] + first * step;
    for (int64_t begin = 0; begin < dwords; begin += LANES, sums += Decoder::VECTORS * LANES) {
        const int64_t left = dwords - begin;
        int64_t safe = left > LANES ? count : 0;  // keys that may be read beyond their row
        if (left == LANES && step >= 4 * dwords) safe = smaller(count, n - 1 - first);
        unrolled<0, Decoder::PARTS>([&](auto p) __attribute__((always_inline)) {
            constexpr int PART = decltype(p)::value;
            F sum[4][QUERIES];
            for (int i = 0; i < 4 * QUERIES; i++) (&sum[0][0])[i] = Vector::zero();
            const auto add = [&](auto full, int64_t key) __attribute__((always_inline)) {
                const uint8_t *at = start + key * step + 4 * begin;
                if (PART == 0) prefetch(at, ahead);
                F x[4];
                decoder.template part<PART, decltype(full)::value>(at, (int)smaller(left, LANES),
                                                                   x);
                unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
                    constexpr int Q = decltype(q)::value;
                    const F weight = Vector::set1(weights[Q * stride + key]);
                    unrolled<0, 4>([&](auto k) __attribute__((always_inline)) {
                        constexpr int AT = decltype(k)::value;
                        sum[AT][Q] = Vector::fma(weight, x[AT], sum[AT][Q]);
                    });
                });
            };
            for (int64_t key = 0; key < safe; key++) add(Int<1>(), key);
            for (int64_t key = safe; key < count; key++) add(Int<0>(), key);
            for (int i = 0; i < 4; i++) {
                for (int q = 0; q < QUERIES; q++) {
                    float *to = sums + q * width + (4 * PART + i) * LANES;
                    Vector::store(to, Vector::add(Vector::load(to), sum[i][q]));
                }
            }
        });
    }
}

struct RowProducts {
    static constexpr int VECTORS = 2 * WIDE, TILE = VECTORS * LANES, ROWS_AT_MOST = FEW_ROWS;
    const AttentionArgs &a;
    const int64_t k_width, v_width;
    float *sums;

    RowProducts(const AttentionArgs &args, Scratch &scratch)
        : a(args), k_width(row_width(*a.k_layout, LANES)), v_width(row_width(*a.v_layout, LANES)) {
        sums = scratch.take<float>(FEW_ROWS * v_width);
    }
    static size_t scratch(const Layout *, const Layout *v) {
        return 4 * FEW_ROWS * (size_t)row_width(*v, LANES) + 64;
    }
    void clear(int64_t rows) { __builtin_memset(sums, 0, 4 * rows * v_width); }

    template <int WIDTH>
    void dot_of(int64_t group, int64_t first, int64_t first_row, int64_t rows, float *logits) {
        const RowDecoder<WIDTH> decoder(a.key.code->centroids);
        const int64_t dwords = a.k_layout->dwords, ahead = ahead_of(a.key.rows, 4 * dwords);
        for (int64_t q = 0; q < rows; q += ROW_QUERIES) {
            const float *query = a.query + (first_row + q) * k_width;
            with_queries<ROW_QUERIES>(smaller(ROW_QUERIES, rows - q), [&](auto number)
                                          __attribute__((always_inline)) {
                constexpr int QUERIES = decltype(number)::value, KEYS = rows_at_once(QUERIES);
                for (int64_t key = 0; key < TILE && first + key < a.n; key += KEYS) {
                    float part[LANES];
                    Vector::store(part, dot_keys<WIDTH, QUERIES>(decoder, a.key, group, first + key,
                                                                 a.n, dwords, ahead, query));
                    for (int i = 0; i < QUERIES; i++)
                        __builtin_memcpy(logits + (q + i) * TILE + key, part + i * KEYS, 4 * KEYS);
                }
            });
        }
    }
    void dot(int64_t group, int64_t first, int64_t first_row, int64_t rows, float *logits) {
        if (a.k_layout->bits == 2) dot_of<2>(group, first, first_row, rows, logits);
        else dot_of<4>(group, first, first_row, rows, logits);
    }
    void scale(int64_t r, int64_t, float factor) {
        for (float *at = sums + r * v_width; at < sums + (r + 1) * v_width; at += LANES)
            Vector::store(at, Vector::mul(Vector::load(at), Vector::set1(factor)));
    }
    void add(int64_t group, int64_t first, int64_t count, int64_t rows, const float *weights) {
        for (int64_t q = 0; q < rows; q += ROW_SUMS) {
            with_queries<ROW_SUMS>(smaller(ROW_SUMS, rows - q), [&](auto number)
                                       __attribute__((always_inline)) {
                constexpr int QUERIES = decltype(number)::value;
                const auto run = [&](auto bits) __attribute__((always_inline)) {
                    add_rows<decltype(bits)::value, QUERIES>(a.value, group, first, count, a.n,
                                                             *a.v_layout, weights + q * TILE, TILE,
                                                             sums + q * v_width);
                };
                if (a.v_layout->bits == 2) run(Int<2>());
                else run(Int<4>());
            });
        }
    }
    void write(int64_t rows, float *out) {
        const int64_t dim = a.v_layout->dim;
        for_channels(*a.v_layout, LANES, Vector::SPLIT_LOOKUP, [&](int64_t at, int64_t channel) {
            for (int64_t r = 0; r < rows; r++) out[r * dim + channel] = sums[r * v_width + at];
        });
    }
};

}  // namespace LEVEL
