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

// Dwords of V vectors of rows, those of the second `gap` after those of the first.
template <int V> struct Turned {
    const uint32_t *dwords;
    int64_t gap;
    INLINE I load(int64_t dword, int v) const {
        return Vector::iload(dwords + v * gap + dword * LANES);
    }
};

// Shift by a number known to the compiler, to the left if it is below 0.
template <int N> static INLINE I moved(I x) {
    if constexpr (N < 0) return Vector::shift_left<-N>(x);
    else return Vector::shift_right<N>(x);
}

// Call codes(m, f, codes) for each step and vector of rows: bytes, whose plane f of fields is.
template <int BITS, int V, class Codes>
static INLINE void each_code(const SearchGroup &g, const Turned<V> &rows, const Codes &codes) {
    constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
    constexpr int FIELDS = 8 / WIDTH;
    constexpr int UPPER = BITS - WIDTH;
    const I mask = Vector::iset1((int32_t)(0x01010101u * ((1u << WIDTH) - 1)));
    const int64_t words = g.steps / FIELDS;
    if constexpr (UPPER == 1 || UPPER == 2) {
        if (g.upper) {
            constexpr int UPPER_FIELDS = 8 / UPPER;
            const I above = Vector::iset1((int32_t)(0x01010101u * (((1u << UPPER) - 1) << WIDTH)));
            const int64_t upper_words = g.steps / UPPER_FIELDS;
            unrolled<0, UPPER_FIELDS>([&](auto field) __attribute__((always_inline)) {
                constexpr int B = decltype(field)::value, F = B * FIELDS / UPPER_FIELDS;
                int64_t m = B * upper_words;
                for (int64_t j = 0; j < upper_words; j++, m++) {
                    I code[V];
                    unrolled<0, V>([&](auto v) __attribute__((always_inline)) {
                        constexpr int AT = decltype(v)::value;
                        const I word = rows.load(m - F * words, AT);
                        const I low = Vector::bit_and(Vector::shift_right<WIDTH * F>(word), mask);
                        const I other = moved<UPPER * B - WIDTH>(rows.load(g.upper + j, AT));
                        code[AT] = Vector::bit_or(low, Vector::bit_and(other, above));
                    });
                    codes(m, code);
                }
            });
            return;
        }
    }
    const SearchField *field = g.fields;
    unrolled<0, FIELDS>([&](auto f) __attribute__((always_inline)) {
        constexpr int F = decltype(f)::value;
        for (int64_t d = 0; d < words; d++) {
            I code[V];
            unrolled<0, V>([&](auto v) __attribute__((always_inline)) {
                constexpr int AT = decltype(v)::value;
                const I word = rows.load(d, AT);
                code[AT] = Vector::bit_and(Vector::shift_right<WIDTH * F>(word), mask);
            });
            if constexpr (BITS != WIDTH) {
                for (; !field->last; field++) {
                    unrolled<0, V>([&](auto v) __attribute__((always_inline)) {
                        constexpr int AT = decltype(v)::value;
                        const I other = rows.load(field->dword, AT);
                        const I bits = field->left ? Vector::shift_left(other, field->left)
                                                   : Vector::shift_right(other, field->right);
                        const I own = Vector::bit_and(bits, Vector::iset1(field->mask));
                        code[AT] = Vector::bit_or(code[AT], own);
                    });
                }
                field++;
            }
            codes(F * words + d, code);
        }
    });
}

// Call narrow(m, v, values) or wide(m, v, even, odd) for each step and vector of rows.
template <int BITS, int V, class Narrow, class Wide>
static INLINE void each_step(const SearchGroup &g, const Turned<V> &rows, const Narrow &narrow,
                             const Wide &wide) {
    const Shuffle<BITS> low(g.table);
    const Shuffle<BITS> high(g.table + (BITS > NARROW_BITS ? 1 << BITS : 0));
    const I pairs = Vector::iset1(0x00FF00FF);
    each_code<BITS, V>(g, rows, [&](int64_t m, const I *codes) __attribute__((always_inline)) {
        unrolled<0, V>([&](auto v) __attribute__((always_inline)) {
            constexpr int AT = decltype(v)::value;
            const I code = codes[AT];
            I index = code;  // a shuffle of a byte whose highest bit is set gives 0
            if constexpr (BITS == 8) index = Vector::bit_and(code, Vector::iset1(0x0F0F0F0F));
            if constexpr (BITS > NARROW_BITS) {
                const I a = low(code, index), b = high(code, index);
                wide(m, AT,
                     Vector::bit_or(Vector::bit_and(a, pairs),
                                    Vector::shift_left<8>(Vector::bit_and(b, pairs))),
                     Vector::merge(pairs, Vector::shift_right<8>(a), b));
            } else {
                narrow(m, AT, low(code, index));
            }
        });
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

// Dwords that a vector of rows takes when it is turned.
static INLINE int64_t turned_size(const SearchArgs &a) { return (int64_t)(a.dwords + 3) * LANES; }

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
    const Turned<1> rows{dwords, 0};
    const auto narrow = [&](int64_t m, int, I values) __attribute__((always_inline)) {
        Vector::istore(out + m * stride, values);
    };
    const auto wide = [&](int64_t m, int, I even, I odd) __attribute__((always_inline)) {
        Vector::istore(out + 2 * m * stride, even);
        Vector::istore(out + (2 * m + 1) * stride, odd);
    };
#define DECODE(BITS) each_step<BITS, 1>(g, rows, narrow, wide)
    BY_BITS(DECODE)
#undef DECODE
}

// sums[v]: of the products of V vectors of rows with one query, straight from their codes.
template <int V>
static __attribute__((noinline)) void sum_codes(const SearchArgs &a, const SearchGroup &g,
                                                const SomeRows *rows, uint32_t *dwords,
                                                const int32_t *words, I *sums) {
    const int64_t gap = turned_size(a);
    for (int v = 0; v < V; v++) turn_some(a, g, rows[v], dwords + v * gap);
    const Turned<V> turned{dwords, gap};
    I sum[V], part[V];
    unrolled<0, V>([&](auto v) __attribute__((always_inline)) {
        sum[decltype(v)::value] = part[decltype(v)::value] = Vector::izero();
    });
    int64_t left = g.span;
    const auto narrow = [&](int64_t m, int v, I values) __attribute__((always_inline)) {
        part[v] = Vector::short_dot(part[v], values, words[m]);
        if (v < V - 1 || --left) return;
        unrolled<0, V>([&](auto each) __attribute__((always_inline)) {
            constexpr int AT = decltype(each)::value;
            sum[AT] = Vector::widen(sum[AT], part[AT]);
            part[AT] = Vector::izero();
        });
        left = g.span;
    };
    const auto wide = [&](int64_t m, int v, I even, I odd) __attribute__((always_inline)) {
        sum[v] = Vector::pair_dot(sum[v], even, words[2 * m]);
        sum[v] = Vector::pair_dot(sum[v], odd, words[2 * m + 1]);
    };
#define SUM(BITS) each_step<BITS, V>(g, turned, narrow, wide)
    BY_BITS(SUM)
#undef SUM
    for (int v = 0; v < V; v++) sums[v] = Vector::widen(sum[v], part[v]);
}

// totals[v] += what groups [from, to) add for one query, straight from the codes.
template <int V>
static INLINE void add_codes(const SearchArgs &a, int from, int to, const SomeRows *rows,
                             uint32_t *dwords, int64_t query, F *totals) {
    for (int at = from; at < to; at++) {
        const SearchGroup &g = a.groups[at];
        I sums[V];
        sum_codes<V>(a, g, rows, dwords, a.words + query * a.word_count + g.word, sums);
        const I correction = Vector::iset1(a.corrections[query * a.count + at]);
        const F weight = Vector::set1(a.weights[query * a.count + at]);
        for (int v = 0; v < V; v++) {
            const F exact = Vector::convert(Vector::isub(sums[v], correction));
            totals[v] = Vector::add(totals[v], Vector::mul(exact, weight));
        }
    }
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
