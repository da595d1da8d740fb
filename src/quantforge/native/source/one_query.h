// Scores of one query, row by row (rows.h).
//
// Instructions per LANES values at 4 bits with AVX-512: 1/2 shift, 1 lookup, 1 multiplication; the
// sums of LANES rows over their lanes are 30 shuffles and 15 additions. As integers: per 4 LANES
// values 1 shuffle, 1 dot product and 3/2 to bring the codes into bytes.
#pragma once

#include "byte_scores.h"
#include "rows.h"

namespace LEVEL {

// Scale the sums of LANES rows, add the offset, write them.
static INLINE void write_scores(const ScoresArgs &a, int64_t group, int64_t first, int64_t count,
                                F sums, float unit) {
    float scales[LANES];
    load_scales(a.packed, group, first, count, LANES, unit, scales);
    float *out = (float *)(a.out.data + a.out.offsets[group]) + first;
    F y = Vector::mul(sums, Vector::load(scales));
    if (a.offset) y = Vector::add(y, Vector::set1(a.offset[group]));
    if (a.accumulate) y = Vector::add(y, Vector::floats(Vector::load_some(out, (int)count)));
    if (count == LANES) Vector::store(out, y);
    else Vector::store_some(out, Vector::bits(y), (int)count);
}

template <int WIDTH>
static void one_query_of(const ScoresArgs &a, int64_t begin, int64_t end) {
    const Layout &layout = *a.layout;
    const RowDecoder<WIDTH> decoder(a.packed.code->centroids);
    const int64_t tiles = (a.n + LANES - 1) / LANES, width = row_width(layout, LANES);
    const int64_t ahead = ahead_of(a.packed.rows, 4 * layout.dwords);
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const F sums = dot_keys<WIDTH, 1>(decoder, a.packed, group, first, a.n, layout.dwords,
                                          ahead, a.query + group * width);
        write_scores(a, group, first, smaller(LANES, a.n - first), sums, 1);
    }
}

static void one_query(const ScoresArgs *a, int64_t begin, int64_t end, void *) {
    if (a->layout->bits == 1) one_query_of<1>(*a, begin, end);
    if (a->layout->bits == 2) one_query_of<2>(*a, begin, end);
    if (a->layout->bits == 4) one_query_of<4>(*a, begin, end);
}

// sums[row] = products of ROWS rows with the integers of one query (block, field, word, lane).
template <int WIDTH>
static INLINE void byte_dot_rows(const Vector::ByteTable &table, const uint8_t *const row[ROWS],
                                 int64_t dwords, int64_t ahead, const int32_t *query,
                                 I sums[ROWS]) {
    constexpr int FIELDS = 8 / WIDTH, STEP = Vector::QUERY_WORDS * LANES;
    const I mask = Vector::iset1(0x01010101 * ((1 << WIDTH) - 1));
    I sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = Vector::izero();
    for_blocks(dwords, true, [&](auto full, int64_t begin, int left)
                                 __attribute__((always_inline)) {
        I word[ROWS];
        unrolled<0, ROWS>([&](auto r) __attribute__((always_inline)) {
            const uint8_t *at = row[decltype(r)::value] + 4 * begin;
            prefetch(at, ahead);
            word[decltype(r)::value] = decltype(full)::value ? Vector::iload(at)
                                                             : Vector::load_some(at, left);
        });
        unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
            constexpr int SHIFT = WIDTH * decltype(f)::value;
            unrolled<0, ROWS>([&](auto r) __attribute__((always_inline)) {
                constexpr int R = decltype(r)::value;
                const I code = Vector::bit_and(Vector::shift_right<SHIFT>(word[R]), mask);
                sum[R] = Vector::dot_lanes(sum[R], Vector::prepare(table(code)), query);
            });
            query += STEP;
        });
    });
    for (int r = 0; r < ROWS; r++) sums[r] = sum[r];
}

template <int WIDTH>
static void one_byte_query_of(const ScoresArgs &a, int64_t begin, int64_t end) {
    constexpr int FIELDS = 8 / WIDTH, STEP = Vector::QUERY_WORDS * LANES;
    const Layout &layout = *a.layout;
    const Vector::ByteTable table(a.packed.code->bytes);
    const int64_t tiles = (a.n + LANES - 1) / LANES;
    const int64_t blocks = (layout.dwords + LANES - 1) / LANES;
    const int64_t ahead = ahead_of(a.packed.rows, 4 * layout.dwords);
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const int32_t *query = a.byte_query + group * blocks * FIELDS * STEP;
        const uint8_t *row[LANES];
        row_addresses(a.packed.rows, group, first, a.n, row);
        I sums[LANES];
        for (int i = 0; i < LANES; i += ROWS)
            byte_dot_rows<WIDTH>(table, row + i, layout.dwords, ahead, query, sums + i);
        const I total = Vector::iadd(Vector::sums_of(sums), Vector::iset1(a.correction[group]));
        write_scores(a, group, first, smaller(LANES, a.n - first), Vector::convert(total),
                     a.query_unit[group] * a.packed.code->byte_unit);
    }
}

static void one_byte_query(const ScoresArgs *a, int64_t begin, int64_t end, void *) {
    if (a->layout->bits == 1) one_byte_query_of<1>(*a, begin, end);
    if (a->layout->bits == 2) one_byte_query_of<2>(*a, begin, end);
    if (a->layout->bits == 4) one_byte_query_of<4>(*a, begin, end);
}

}  // namespace LEVEL
