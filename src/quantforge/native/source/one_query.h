// Scores of one query, row by row: nothing is transposed but the sums at the end.
//
// A row's dwords stay where they are, a lane holds the channels of one dword, and the query is
// packed in the order in which a block of LANES dwords yields channels:
//
//     block, byte b, field f:   lane i  =  channel 4 (block * LANES + i) + b + f * stride
//
// Loaded from b bytes further on, byte b of each dword lies in the lowest bits and needs no shift.
// Instructions per LANES values at 4 bits (AVX-512): 1/2 shift, 1 lookup, 1 multiplication.
#pragma once

#include "byte_scores.h"

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
    Vector::store_some(out, Vector::bits(y), (int)count);
}

template <int WIDTH>
static INLINE F dot_row(const uint8_t *row, int64_t dwords, bool may_overread,
                        const Vector::Lookup<WIDTH> &lookup, const float *query) {
    constexpr int FIELDS = 8 / WIDTH;
    F sum[2] = {Vector::zero(), Vector::zero()};
    const auto add = [&](auto k, I word) __attribute__((always_inline)) {
        constexpr int BYTE = decltype(k)::value;
        unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
            constexpr int FIELD = decltype(f)::value;
            F &part = sum[FIELD % 2];
            const F q = Vector::load(query + (BYTE * FIELDS + FIELD) * LANES);
            part = Vector::fma(lookup(Vector::shift_right<WIDTH * FIELD>(word)), q, part);
        });
    };
    for (int64_t begin = 0; begin < dwords; begin += LANES, query += 4 * FIELDS * LANES) {
        const uint8_t *at = row + 4 * begin;
        const int64_t left = dwords - begin;
        if (left > LANES || (left == LANES && may_overread)) {
            unrolled<0, 4>([&](auto b) __attribute__((always_inline)) {
                add(b, Vector::iload(at + decltype(b)::value));
            });
        } else {
            const I word = Vector::load_some(at, (int)smaller(left, LANES));
            unrolled<0, 4>([&](auto b) __attribute__((always_inline)) {
                add(b, Vector::shift_right<8 * decltype(b)::value>(word));
            });
        }
    }
    return Vector::add(sum[0], sum[1]);
}

template <int WIDTH>
static void one_query_of(const ScoresArgs &a, int64_t begin, int64_t end) {
    const Layout &layout = *a.layout;
    const Vector::Lookup<WIDTH> lookup(a.packed.code->centroids);
    const int64_t tiles = (a.n + LANES - 1) / LANES, bytes = 4 * layout.dwords;
    const int64_t blocks = (layout.dwords + LANES - 1) / LANES;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const float *query = a.query + group * blocks * (32 / WIDTH) * LANES;
        const uint8_t *row[LANES];
        row_addresses(a.packed.rows, group, first, a.n, row);
        prefetch_rows(a.packed.rows, group, first + 2 * LANES, LANES, a.n, (int)bytes);
        I sums[LANES];
        for (int i = 0; i < LANES; i++) {
            const bool inside = first + i < a.n - 1 && a.packed.rows.stride >= bytes;
            sums[i] = Vector::bits(dot_row<WIDTH>(row[i], layout.dwords, inside, lookup, query));
        }
        Vector::transpose(sums);
        F total = Vector::floats(sums[0]);
        for (int i = 1; i < LANES; i++) total = Vector::add(total, Vector::floats(sums[i]));
        write_scores(a, group, first, smaller(LANES, a.n - first), total, 1);
    }
}

static void one_query(const ScoresArgs *a, int64_t begin, int64_t end, void *) {
    if (a->layout->bits == 1) one_query_of<1>(*a, begin, end);
    if (a->layout->bits == 2) one_query_of<2>(*a, begin, end);
    if (a->layout->bits == 4) one_query_of<4>(*a, begin, end);
}

// The integers of one query; TERMS of them, as in byte_scores.h.
template <int WIDTH, int TERMS>
static void one_byte_query_of(const ScoresArgs &a, int64_t begin, int64_t end) {
    constexpr int FIELDS = 8 / WIDTH, STEP = Vector::QUERY_WORDS * LANES;
    const Layout &layout = *a.layout;
    const Vector::ByteTable table(a.packed.code->bytes);
    const I mask = Vector::iset1(0x01010101 * ((1 << WIDTH) - 1));
    const int64_t tiles = (a.n + LANES - 1) / LANES, bytes = 4 * layout.dwords;
    const int64_t blocks = (layout.dwords + LANES - 1) / LANES;
    for (int64_t t = begin; t < end; t++) {
        const int64_t group = t / tiles, first = t % tiles * LANES;
        const uint8_t *row[LANES];
        row_addresses(a.packed.rows, group, first, a.n, row);
        prefetch_rows(a.packed.rows, group, first + 4 * LANES, LANES, a.n, (int)bytes);
        I sums[TERMS][LANES];
        for (int i = 0; i < LANES; i++) {
            const int32_t *query = a.byte_query + group * blocks * FIELDS * TERMS * STEP;
            I sum[TERMS];
            for (int term = 0; term < TERMS; term++) sum[term] = Vector::izero();
            for (int64_t d = 0; d < layout.dwords; d += LANES) {
                const int64_t left = layout.dwords - d;
                const I word = left >= LANES ? Vector::iload(row[i] + 4 * d)
                                             : Vector::load_some(row[i] + 4 * d, (int)left);
                unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
                    constexpr int FIELD = decltype(f)::value;
                    const I code = Vector::bit_and(Vector::shift_right<WIDTH * FIELD>(word), mask);
                    const Vector::Bytes x = Vector::prepare(table(code));
                    unrolled<0, TERMS>([&](auto k) __attribute__((always_inline)) {
                        constexpr int TERM = decltype(k)::value;
                        sum[TERM] = Vector::dot_lanes(sum[TERM], x, query + TERM * STEP);
                    });
                    query += TERMS * STEP;
                });
            }
            for (int term = 0; term < TERMS; term++) sums[term][i] = sum[term];
        }
        F total = Vector::zero();
        for (int term = 0; term < TERMS; term++) {
            Vector::transpose(sums[term]);
            I sum = Vector::iset1(a.correction[group * TERMS + term]);
            for (int i = 0; i < LANES; i++) sum = Vector::iadd(sum, sums[term][i]);
            const F unit = Vector::set1(a.query_unit[group * TERMS + term]);
            total = Vector::add(total, Vector::mul(Vector::convert(sum), unit));
        }
        write_scores(a, group, first, smaller(LANES, a.n - first), total, a.packed.code->byte_unit);
    }
}

static void one_byte_query(const ScoresArgs *a, int64_t begin, int64_t end, void *) {
#define CASE(WIDTH, TERMS)                                                                       \
    if (a->layout->bits == WIDTH && a->terms == TERMS)                                           \
        return one_byte_query_of<WIDTH, TERMS>(*a, begin, end);
    CASE(1, 1) CASE(1, 2) CASE(2, 1) CASE(2, 2) CASE(4, 1) CASE(4, 2)
#undef CASE
}

}  // namespace LEVEL
