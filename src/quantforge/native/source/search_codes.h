// Integer products of queries with rows of packed codes: search.h says what of.
#pragma once

#include "decode.h"
#include "search_args.h"

namespace LEVEL {

// Looks bytes of BITS bits up: sixteen at a time by `index`, which ends in the low four bits.
template <int BITS> struct Shuffle {
    Shuffle<BITS - 1> low, high;
    explicit Shuffle(const uint8_t *t) : low(t), high(t + (1 << (BITS - 1))) {}
    INLINE I operator()(I code, I index) const {
        const I bit = Vector::shift_left<8 - BITS>(code);
        return Vector::blend_bytes(bit, high(code, index), low(code, index));
    }
};
template <> struct Shuffle<4> {
    Vector::ByteTable table;
    explicit Shuffle(const uint8_t *t) : table(t) {}
    INLINE I operator()(I, I index) const { return table(index); }
};
template <> struct Shuffle<3> : Shuffle<4> { using Shuffle<4>::Shuffle; };
template <> struct Shuffle<2> : Shuffle<4> { using Shuffle<4>::Shuffle; };
template <> struct Shuffle<1> : Shuffle<4> { using Shuffle<4>::Shuffle; };

// Dwords of LANES rows to dwords[d][lane]. `past`: 12 bytes past the end of a row may be read.
static INLINE void turn_rows(const SearchGroup &g, const uint8_t *const row[LANES], bool past,
                             uint32_t *dwords) {
    if (Vector::HALF_TURN && past) {
        for (int64_t d = 0; d < g.dwords; d += 4) Vector::turn_four(row, 4 * d, dwords + d * LANES);
        return;
    }
    for (int64_t begin = 0; begin < g.dwords; begin += LANES) {
        I dword[LANES];
        load_dwords(row, begin, g.dwords, dword);
        const int64_t end = smaller(begin + LANES, g.dwords);
        for (int64_t d = begin; d < end; d++) Vector::istore(dwords + d * LANES, dword[d - begin]);
    }
}

// Call narrow(m, values) or wide(m, even, odd) for each step of the rows turned to `dwords`.
template <int BITS, class Narrow, class Wide>
static INLINE void each_step(const SearchGroup &g, const uint32_t *dwords, const Narrow &narrow,
                             const Wide &wide) {
    constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
    constexpr int FIELDS = 8 / WIDTH;
    const Shuffle<BITS> low(g.table);
    const Shuffle<BITS> high(g.table + (BITS > NARROW_BITS ? 1 << BITS : 0));
    const I mask = Vector::iset1((int32_t)(0x01010101u * ((1u << WIDTH) - 1)));
    const I pairs = Vector::iset1(0x00FF00FF);
    const int64_t words = g.steps / FIELDS;
    const SearchField *field = g.fields;
    unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
        for (int64_t d = 0; d < words; d++) {
            const int64_t m = decltype(f)::value * words + d;
            const I word = Vector::iload(dwords + d * LANES);
            I code = Vector::bit_and(Vector::shift_right<WIDTH * decltype(f)::value>(word), mask);
            if constexpr (BITS != WIDTH) {
                for (; !field->last; field++) {
                    const I other = Vector::iload(dwords + field->dword * LANES);
                    const I bits = Vector::rotate_right(other, field->rotation);
                    code = Vector::bit_or(code, Vector::bit_and(bits, Vector::iset1(field->mask)));
                }
                field++;
            }
            I index = code;  // a shuffle of a byte whose highest bit is set gives 0
            if constexpr (BITS == 8) index = Vector::bit_and(code, Vector::iset1(0x0F0F0F0F));
            if constexpr (BITS > NARROW_BITS) {
                const I a = low(code, index), b = high(code, index);
                wide(m,
                     Vector::bit_or(Vector::bit_and(a, pairs),
                                    Vector::shift_left<8>(Vector::bit_and(b, pairs))),
                     Vector::merge(pairs, Vector::shift_right<8>(a), b));
            } else {
                narrow(m, low(code, index));
            }
        }
    });
}

#define BY_BITS(CALL)                                                                            \
    switch (g.bits) {                                                                            \
        case 1: CALL(1); break;                                                                  \
        case 2: CALL(2); break;                                                                  \
        case 3: CALL(3); break;                                                                  \
        case 4: CALL(4); break;                                                                  \
        case 5: CALL(5); break;                                                                  \
        case 6: CALL(6); break;                                                                  \
        case 7: CALL(7); break;                                                                  \
        case 8: CALL(8); break;                                                                  \
    }

// LANES rows: those that follow `first` in a range that ends at `end`, the last one standing in
// past it, or any.
struct SomeRows {
    int64_t row[LANES];
    int64_t last;

    static INLINE SomeRows from(int64_t first, int64_t end) {
        SomeRows out;
        for (int i = 0; i < LANES; i++) out.row[i] = smaller(first + i, end - 1);
        out.last = out.row[LANES - 1];
        return out;
    }
};

static INLINE void turn_some(const SearchArgs &a, const SearchGroup &g, const SomeRows &rows,
                             uint32_t *dwords) {
    const uint8_t *row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = g.rows + rows.row[i] * g.stride;
    turn_rows(g, row, (a.rows - 1 - rows.last) * g.stride >= 12, dwords);
}

// Decode LANES rows to integers, `stride` dwords from one word to the next.
static __attribute__((noinline)) void decode_group(const SearchArgs &a, const SearchGroup &g,
                                                   int64_t first, int64_t end, uint32_t *dwords,
                                                   uint32_t *out, int64_t stride) {
    turn_some(a, g, SomeRows::from(first, end), dwords);
    const auto narrow = [&](int64_t m, I values) __attribute__((always_inline)) {
        Vector::istore(out + m * stride, values);
    };
    const auto wide = [&](int64_t m, I even, I odd) __attribute__((always_inline)) {
        Vector::istore(out + 2 * m * stride, even);
        Vector::istore(out + (2 * m + 1) * stride, odd);
    };
#define DECODE(BITS) each_step<BITS>(g, dwords, narrow, wide)
    BY_BITS(DECODE)
#undef DECODE
}

// The sum of products of LANES rows with one query, straight from their codes.
static __attribute__((noinline)) I sum_of_codes(const SearchArgs &a, const SearchGroup &g,
                                                const SomeRows &rows, uint32_t *dwords,
                                                const int32_t *words) {
    turn_some(a, g, rows, dwords);
    I sum = Vector::izero(), part = Vector::izero();
    int64_t left = g.span;
    const auto narrow = [&](int64_t m, I values) __attribute__((always_inline)) {
        part = Vector::short_dot(part, values, words[m]);
        if (--left) return;
        sum = Vector::widen(sum, part);
        part = Vector::izero();
        left = g.span;
    };
    const auto wide = [&](int64_t m, I even, I odd) __attribute__((always_inline)) {
        sum = Vector::pair_dot(sum, even, words[2 * m]);
        sum = Vector::pair_dot(sum, odd, words[2 * m + 1]);
    };
#define SUM(BITS) each_step<BITS>(g, dwords, narrow, wide)
    BY_BITS(SUM)
#undef SUM
    return Vector::widen(sum, part);
}

// What groups [from, to) add to the totals of LANES rows and one query, straight from their codes.
static INLINE F add_codes(const SearchArgs &a, int from, int to, const SomeRows &rows,
                          uint32_t *dwords, int64_t query, F total) {
    for (int at = from; at < to; at++) {
        const SearchGroup &g = a.groups[at];
        const int32_t *words = a.words + query * a.word_count + g.word;
        const I sum = sum_of_codes(a, g, rows, dwords, words);
        const I correction = Vector::iset1(a.corrections[query * a.count + at]);
        const F exact = Vector::convert(Vector::isub(sum, correction));
        const F weight = Vector::set1(a.weights[query * a.count + at]);
        total = Vector::add(total, Vector::mul(exact, weight));
    }
    return total;
}

// totals[q][w] += what groups [from, to) add; values (word, w, lane) of the groups from `from` on.
template <int QUERIES, int W>
static INLINE void add_groups(const SearchArgs &a, int from, int to, const uint32_t *values,
                              const int64_t *query, F totals[QUERIES][W]) {
    for (int at = from; at < to; at++) {
        const SearchGroup &g = a.groups[at];
        const int32_t *words[QUERIES];
        for (int q = 0; q < QUERIES; q++) words[q] = a.words + query[q] * a.word_count + g.word;
        I sums[QUERIES][W];
        unrolled<0, QUERIES * W>([&](auto k) __attribute__((always_inline)) {
            (&sums[0][0])[decltype(k)::value] = Vector::izero();
        });
        const auto each = [&](int64_t m, const auto &body) __attribute__((always_inline)) {
            unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
                constexpr int AT = decltype(w)::value;
                const I x = Vector::iload(values + (m * W + AT) * LANES);
                unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
                    body(decltype(q)::value, AT, x, words[decltype(q)::value][m]);
                });
            });
        };
        if (g.bits > NARROW_BITS) {
            for (int64_t m = 0; m < 2 * g.steps; m++)
                each(m, [&](int q, int w, I x, int32_t word) __attribute__((always_inline)) {
                    sums[q][w] = Vector::pair_dot(sums[q][w], x, word);
                });
            values += 2 * g.steps * W * LANES;
        } else {
            for (int64_t m = 0; m < g.steps;) {
                const int64_t stop = smaller(m + g.span, g.steps);
                I part[QUERIES][W];
                unrolled<0, QUERIES * W>([&](auto k) __attribute__((always_inline)) {
                    (&part[0][0])[decltype(k)::value] = Vector::izero();
                });
                for (; m < stop; m++)
                    each(m, [&](int q, int w, I x, int32_t word) __attribute__((always_inline)) {
                        part[q][w] = Vector::short_dot(part[q][w], x, word);
                    });
                unrolled<0, QUERIES * W>([&](auto k) __attribute__((always_inline)) {
                    I &sum = (&sums[0][0])[decltype(k)::value];
                    sum = Vector::widen(sum, (&part[0][0])[decltype(k)::value]);
                });
            }
            values += g.steps * W * LANES;
        }
        unrolled<0, QUERIES>([&](auto q) __attribute__((always_inline)) {
            constexpr int Q = decltype(q)::value;
            const I correction = Vector::iset1(a.corrections[query[Q] * a.count + at]);
            const F weight = Vector::set1(a.weights[query[Q] * a.count + at]);
            unrolled<0, W>([&](auto w) __attribute__((always_inline)) {
                constexpr int AT = decltype(w)::value;
                const F sum = Vector::convert(Vector::isub(sums[Q][AT], correction));
                totals[Q][AT] = Vector::add(totals[Q][AT], Vector::mul(sum, weight));
            });
        });
    }
}

}  // namespace LEVEL
