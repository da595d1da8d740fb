// Scores with int8 centroids and an integer query: precision "fast", bits 1 to 4.
//
// A dword lane holds four channels of a row. Fields are masked into bytes, a byte shuffle looks
// all four up, and one dot-product instruction adds four products to the lane's sum:
//
//     values[m], m = dword * fields + field:   4 channels  x  LANES rows
//
// Instructions per 4 LANES values and query with VNNI: 1 dot product; decoding 3 (and, shift,
// shuffle) once for all queries, the transpose 4 / fields.
#pragma once

#include "products.h"

namespace LEVEL {

constexpr int BYTE_WIDE = 4;

template <int WIDTH, bool HIGH_BIT>
static INLINE void decode_bytes(const Layout &layout, const Vector::ByteTable &table,
                                const uint8_t *const row[LANES], uint32_t *values, int64_t stride,
                                const uint32_t *high) {
    constexpr int FIELDS = 8 / WIDTH;
    const I mask = Vector::iset1(0x01010101 * ((1 << WIDTH) - 1));
    const I one = Vector::iset1(0x01010101);
    const int64_t used = (layout.plane[0].stride + 3) / 4;
    for (int64_t begin = 0; begin < used; begin += LANES) {
        I dword[LANES];
        load_dwords(row, begin, layout.dwords, dword);
        const int64_t end = smaller(begin + LANES, used);
        for (int64_t d = begin; d < end; d++) {
            const I word = dword[d - begin];
            uint32_t *out = values + d * FIELDS * stride;
            unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
                constexpr int FIELD = decltype(f)::value;
                I code = Vector::bit_and(Vector::shift_right<WIDTH * FIELD>(word), mask);
                if constexpr (HIGH_BIT) {  // plane 1 has half as many bytes, each for two fields
                    const int64_t half = layout.plane[1].stride;
                    const int64_t byte = 4 * d + FIELD * layout.plane[0].stride;
                    const I bits = Vector::iload(high + byte % half / 4 * LANES);
                    const int slot = (int)(byte / half);
                    const I bit = Vector::bit_and(Vector::shift_right(bits, slot), one);
                    code = Vector::bit_or(code, Vector::shift_left<2>(bit));
                }
                Vector::istore(out + FIELD * stride, table(code));
            });
        }
    }
}

// sums[q][w] += dot products of `steps` groups of four channels.
template <int QUERIES, int W>
static INLINE void byte_dots(const uint32_t *values, const int32_t *query, int64_t steps,
                             I sums[QUERIES][W]) {
    constexpr int WORDS = Vector::QUERY_WORDS;
    constexpr int CHAINS = QUERIES * W <= 4 ? 2 : 1;
    I chain[CHAINS][QUERIES][W];
    unrolled<0, CHAINS * QUERIES * W>([&](auto k) __attribute__((always_inline)) {
        (&chain[0][0][0])[decltype(k)::value] = Vector::izero();
    });
    const auto step = [&](auto c, int64_t m) __attribute__((always_inline)) {
        Vector::Bytes x[W];
        unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
            constexpr int AT = decltype(w)::value;
            x[AT] = Vector::prepare(Vector::iload(values + (m * W + AT) * LANES));
        });
        unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
            constexpr int AT = decltype(q)::value;
            unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
                I &sum = chain[decltype(c)::value][AT][decltype(w)::value];
                sum = Vector::dot(sum, x[decltype(w)::value],
                                  query + (m * QUERIES + AT) * WORDS);
            });
        });
    };
    int64_t m = 0;
    for (; m + CHAINS <= steps; m += CHAINS) {
        unrolled<0, CHAINS>([&](auto c) __attribute__((always_inline)) {
            step(c, m + decltype(c)::value);
        });
    }
    for (; m < steps; m++) step(Int<0>(), m);
    unrolled<0, QUERIES * W>([&](auto k) __attribute__((always_inline)) {
        constexpr int AT = decltype(k)::value;
        I total = (&chain[0][0][0])[AT];
        if constexpr (CHAINS == 2) total = Vector::iadd(total, (&chain[CHAINS - 1][0][0])[AT]);
        (&sums[0][0])[AT] = total;
    });
}

// Vectors of rows per tile: fewer registers are left where a query takes two words.
constexpr int BYTE_W = Vector::QUERY_WORDS == 1 ? BYTE_WIDE : 2;
constexpr int BYTE_QUERIES = Vector::QUERY_WORDS == 1 ? 6 : 4;  // even: two terms stay together

static INLINE void decode_byte_tile(const ScoresArgs &a, int64_t group, int64_t first,
                                    uint32_t *values, uint32_t *high) {
    const Layout &layout = *a.layout;
    const Vector::ByteTable table(a.packed.code->bytes);
    for (int w = 0; w < BYTE_W; w++) {
        const uint8_t *row[LANES];
        row_addresses(a.packed.rows, group, first + w * LANES, a.n, row);
        uint32_t *out = values + w * LANES;
        constexpr int64_t STRIDE = BYTE_W * LANES;
        switch (layout.bits) {
        case 1: decode_bytes<1, false>(layout, table, row, out, STRIDE, nullptr); break;
        case 2: decode_bytes<2, false>(layout, table, row, out, STRIDE, nullptr); break;
        case 4: decode_bytes<4, false>(layout, table, row, out, STRIDE, nullptr); break;
        case 3: {
            const int64_t start = layout.plane[1].offset / 4;
            for (int64_t begin = start; begin < layout.dwords; begin += LANES) {
                I dword[LANES];
                load_dwords(row, begin, layout.dwords, dword);
                for (int64_t d = begin; d < smaller(begin + LANES, layout.dwords); d++)
                    Vector::istore(high + (d - start) * LANES, dword[d - begin]);
            }
            decode_bytes<2, true>(layout, table, row, out, STRIDE, high);
        }
        }
    }
}

static INLINE int64_t byte_steps(const Layout &layout) {
    return (layout.plane[0].stride + 3) / 4 * (8 / layout.plane[0].width);
}

static size_t byte_scratch(const Layout *layout) {
    return (size_t)(byte_steps(*layout) * BYTE_W + layout->dwords) * LANES * 4 + 512;
}

static void byte_scores(const ScoresArgs *args, int64_t begin, int64_t end, void *memory) {
    const ScoresArgs &a = *args;
    const Layout &layout = *a.layout;
    constexpr int TILE = BYTE_W * LANES;
    const int64_t steps = byte_steps(layout);
    Scratch scratch{(uint8_t *)memory};
    uint32_t *values = scratch.take<uint32_t>(steps * TILE);
    uint32_t *high = scratch.take<uint32_t>((int64_t)layout.dwords * LANES);
    const int64_t tiles = (a.n + TILE - 1) / TILE;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * TILE;
        const int64_t count = smaller(TILE, a.n - first);
        decode_byte_tile(a, group, first, values, high);
        float scales[TILE];
        load_scales(a.packed, group, first, count, TILE, a.packed.code->byte_unit, scales);
        const int64_t terms = a.queries * a.terms;
        const int32_t *query = a.byte_query + group * terms * steps * Vector::QUERY_WORDS;
        for (int64_t q = 0; q < terms; q += BYTE_QUERIES) {
            with_queries<BYTE_QUERIES>(smaller(BYTE_QUERIES, terms - q), [&](auto number)
                                           __attribute__((always_inline)) {
                constexpr int QUERIES = decltype(number)::value;
                prefetch_slice(a, group, first + TILE, TILE, q, q + QUERIES, terms);
                for (int i = 0; i < QUERIES; i += a.terms)
                    prefetch_scores(a, group, (q + i) / a.terms, first, count);
                I sums[QUERIES][BYTE_W];
                byte_dots<QUERIES, BYTE_W>(values, query + q * steps * Vector::QUERY_WORDS, steps,
                                           sums);
                const auto value = [&](int i, int w) __attribute__((always_inline)) {
                    const int64_t at = group * terms + q + i;
                    const I sum = Vector::iadd(sums[i][w], Vector::iset1(a.correction[at]));
                    return Vector::mul(Vector::convert(sum), Vector::set1(a.query_unit[at]));
                };
                for (int i = 0; i < QUERIES; i += a.terms) {
                    const int64_t number_of_query = (q + i) / a.terms;
                    float *out = (float *)(a.out.data + a.out.offsets[group]
                                           + number_of_query * a.out.stride) + first;
                    for (int w = 0; w < BYTE_W; w++) {
                        const int64_t left = count - w * LANES;
                        if (left <= 0) break;
                        F y = value(i, w);
                        if (a.terms == 2) y = Vector::add(y, value(i + 1, w));
                        y = Vector::mul(y, Vector::load(scales + w * LANES));
                        if (a.offset) {
                            const float offset = a.offset[group * a.queries + number_of_query];
                            y = Vector::add(y, Vector::set1(offset));
                        }
                        if (left >= LANES) Vector::store(out + w * LANES, y);
                        else Vector::store_some(out + w * LANES, Vector::bits(y), (int)left);
                    }
                }
            });
        }
    }
}

}  // namespace LEVEL
