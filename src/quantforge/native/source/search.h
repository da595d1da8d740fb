// Search in rows that consist of several groups of codes, each with its own bits: integer products
// with all groups, and the best rows of every query.
//
//     total = sum over groups, in order, of float(sum of z t) * weight      z, t: integers
//     score = (total * scale + offset) + base                               float32, no fma
//
// Integers make totals exact, so every level, tile and backend finds the same scores. Products of
// narrow groups (up to 5 bits) are of bytes, those of wide ones of pairs of 16-bit numbers:
//
//     narrow   word m:            4 channels  x  LANES rows
//     wide     words 2 m, 2 m + 1:  channels 0 and 2, 1 and 3 of the four  x  LANES rows
//
// The first `lead` groups are multiplied for all rows. The others count at most
// `rest of the query * rest of the row` (Cauchy and Schwarz); where that cannot lift one of LANES
// rows over what a query has found, they are not looked at. Instructions per 4 LANES products of a
// narrow group with AVX2: 2 + 2 / span; decoding once for all queries.
#pragma once

#include "decode.h"
#include "search_args.h"

namespace LEVEL {

constexpr int SEARCH_W = 4;  // vectors of rows per tile
constexpr int SEARCH_TILE = SEARCH_W * LANES;
constexpr int SEARCH_QUERIES = Vector::MAX_ACCUMULATORS >= 16 ? 4 : 2;

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

// Rows [first, first + LANES) of a range that ends at `end`, the last one standing in past it.
static INLINE void turn_range(const SearchArgs &a, const SearchGroup &g, int64_t first,
                              int64_t end, uint32_t *dwords) {
    const uint8_t *row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = g.rows + smaller(first + i, end - 1) * g.stride;
    const int64_t last = smaller(first + LANES, end);
    turn_rows(g, row, (a.rows - last) * g.stride >= 12, dwords);
}

// Decode LANES rows to integers, `stride` dwords from one word to the next.
static __attribute__((noinline)) void decode_group(const SearchArgs &a, const SearchGroup &g,
                                                   int64_t first, int64_t end, uint32_t *dwords,
                                                   uint32_t *out, int64_t stride) {
    turn_range(a, g, first, end, dwords);
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
                                                int64_t first, int64_t end, uint32_t *dwords,
                                                const int32_t *words) {
    turn_range(a, g, first, end, dwords);
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
static INLINE F add_codes(const SearchArgs &a, int from, int to, int64_t first, int64_t end,
                          uint32_t *dwords, int64_t query, F total) {
    for (int at = from; at < to; at++) {
        const SearchGroup &g = a.groups[at];
        const int32_t *words = a.words + query * a.word_count + g.word;
        const I sum = sum_of_codes(a, g, first, end, dwords, words);
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

// What is known of a tile of rows besides their codes.
struct SearchTile {
    alignas(64) float scales[SEARCH_TILE];
    alignas(64) float offsets[SEARCH_TILE];  // -inf for rows that may not be found
    alignas(64) float rests[SEARCH_TILE];    // scale * rest, with a margin for rounding
    float largest;                           // offset
};

static INLINE void load_tile(const SearchArgs &a, int64_t first, int64_t count, SearchTile &t) {
    const float nothing = -__builtin_inff();
    F largest = Vector::zero();
    for (int w = 0; w < SEARCH_W; w++) {
        const int64_t row = first + w * LANES;
        uint16_t half[3][LANES];
        const uint16_t *from[3] = {a.scales + row, a.offsets + row, a.rests + row};
        if (count < (w + 1) * LANES) {  // past the end: scale 0
            for (int kind = 0; kind < (a.rests ? 3 : 2); kind++) {
                for (int i = 0; i < LANES; i++)
                    half[kind][i] = w * LANES + i < count ? from[kind][i] : 0;
                from[kind] = half[kind];
            }
        }
        const F scales = Vector::from_half(from[0]);
        const F offsets = Vector::mul(Vector::from_half(from[1]), Vector::set1(a.unit));
        largest = Vector::max(largest, Vector::abs(offsets));
        Vector::store(t.scales + w * LANES, scales);
        Vector::store(t.offsets + w * LANES, offsets);
        if (a.rests) {
            const F rests = Vector::abs(Vector::mul(Vector::from_half(from[2]), scales));
            Vector::store(t.rests + w * LANES, Vector::mul(rests, Vector::set1(1.0001f)));
        }
    }
    t.largest = Vector::maximum(largest);
    for (int64_t i = count; i < SEARCH_TILE; i++) t.offsets[i] = nothing;
    if (!a.bitmap) return;
    for (int64_t i = 0; i < count; i++)
        if (!(a.bitmap[(first + i) >> 3] >> ((first + i) & 7) & 1)) t.offsets[i] = nothing;
}

// Put the rows of a vector of scores that are good enough among the best of a query.
static INLINE void keep(Best &best, F total, const SearchTile &t, int w,
                        int64_t first, float base) {
    const F scaled = Vector::mul(total, Vector::load(t.scales + w * LANES));
    const F scores = Vector::add(Vector::add(scaled, Vector::load(t.offsets + w * LANES)),
                                 Vector::set1(base));
    const F limit = Vector::set1(best.limit());
    uint32_t bits = Vector::bits_of(Vector::at_least(scores, limit))
                  & Vector::bits_of(Vector::greater(scores, Vector::set1(-__builtin_inff())));
    if (!bits) return;
    float each[LANES];
    Vector::store(each, scores);
    for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctz(bits);
        best.offer(each[i], first + w * LANES + i);
    }
}

// What a row must reach with all it may have: less than what a query has found, by rounding.
static INLINE float least_of(const Best &best, const SearchTile &t, float base) {
    const float limit = best.limit(), size = limit < 0 ? -limit : limit;
    return limit - base - 1e-5f * (size + (base < 0 ? -base : base) + t.largest);
}

// Bits of the rows of a vector that may have a score good enough.
static INLINE uint32_t may_be_good(F total, const SearchTile &t, int w, F query_rest, F least) {
    const F known = Vector::fma(total, Vector::load(t.scales + w * LANES),
                                Vector::load(t.offsets + w * LANES));
    const F bound = Vector::fma(query_rest, Vector::load(t.rests + w * LANES), known);
    return Vector::bits_of(Vector::at_least(bound, least));
}

// A tile for one query: nothing is decoded to memory.
static INLINE void search_one(const SearchArgs &a, const SearchTask &task, int64_t part,
                              int64_t first, int64_t count, const SearchTile &t,
                              uint32_t *dwords) {
    const int64_t visit = task.visit_begin, query = a.visitors ? a.visitors[visit] : visit;
    const float base = a.base[visit];
    Best best = a.best_of(part, query);
    for (int w = 0; w * LANES < count; w++) {
        const int64_t row = first + w * LANES;
        F total = add_codes(a, 0, a.lead, row, task.end, dwords, query, Vector::zero());
        if (a.lead < a.count) {
            const F least = Vector::set1(least_of(best, t, base));
            if (!may_be_good(total, t, w, Vector::set1(a.query_rests[query]), least)) continue;
            total = add_codes(a, a.lead, a.count, row, task.end, dwords, query, total);
        }
        keep(best, total, t, w, first, base);
    }
}

static size_t search_scratch(const SearchArgs *a) {
    return 4 * (size_t)a->word_count * SEARCH_TILE + 4 * (size_t)(a->dwords + 3) * LANES + 1024
         + sizeof(SearchTile);
}

static void search(const SearchArgs *args, const SearchTask *task, int64_t part, void *memory) {
    const SearchArgs &a = *args;
    Scratch scratch{(uint8_t *)memory};
    uint32_t *values = scratch.take<uint32_t>(a.lead_words * SEARCH_TILE);
    uint32_t *others = scratch.take<uint32_t>((a.word_count - a.lead_words) * SEARCH_TILE);
    uint32_t *dwords = scratch.take<uint32_t>((int64_t)(a.dwords + 3) * LANES);
    SearchTile &tile = *scratch.take<SearchTile>(1);
    const bool rest = a.lead < a.count;
    const int64_t rest_size = (a.word_count - a.lead_words) * LANES;
    const bool one = task->visit_end - task->visit_begin == 1;
    for (int64_t first = task->begin; first < task->end; first += SEARCH_TILE) {
        const int64_t count = smaller(SEARCH_TILE, task->end - first);
        load_tile(a, first, count, tile);
        if (one) {
            search_one(a, *task, part, first, count, tile, dwords);
            continue;
        }
        for (int w = 0; w < SEARCH_W; w++)
            for (int g = 0; g < a.lead; g++)
                decode_group(a, a.groups[g], first + w * LANES, task->end, dwords,
                             values + ((a.groups[g].word * SEARCH_W) + w) * LANES, SEARCH_TILE);
        bool decoded[SEARCH_W] = {};
        const auto look = [&](auto number, int64_t visit) __attribute__((always_inline)) {
            constexpr int QUERIES = decltype(number)::value;
            int64_t query[QUERIES];
            for (int q = 0; q < QUERIES; q++)
                query[q] = a.visitors ? a.visitors[visit + q] : visit + q;
            F totals[QUERIES][SEARCH_W];
            unrolled<0, QUERIES * SEARCH_W>([&](auto k) __attribute__((always_inline)) {
                (&totals[0][0])[decltype(k)::value] = Vector::zero();
            });
            add_groups<QUERIES, SEARCH_W>(a, 0, a.lead, values, query, totals);
            for (int q = 0; q < QUERIES; q++) {
                const float base = a.base[visit + q];
                Best best = a.best_of(part, query[q]);
                if (!rest) {
                    for (int w = 0; w < SEARCH_W; w++)
                        keep(best, totals[q][w], tile, w, first, base);
                    continue;
                }
                const F least = Vector::set1(least_of(best, tile, base));
                const F query_rest = Vector::set1(a.query_rests[query[q]]);
                for (int w = 0; w < SEARCH_W; w++) {
                    if (!may_be_good(totals[q][w], tile, w, query_rest, least)) continue;
                    uint32_t *at = others + w * rest_size;
                    if (!decoded[w]) {
                        for (int g = a.lead; g < a.count; g++)
                            decode_group(a, a.groups[g], first + w * LANES, task->end, dwords,
                                         at + (a.groups[g].word - a.lead_words) * LANES, LANES);
                        decoded[w] = true;
                    }
                    F all[1][1] = {{totals[q][w]}};
                    add_groups<1, 1>(a, a.lead, a.count, at, query + q, all);
                    keep(best, all[0][0], tile, w, first, base);
                }
            }
        };
        int64_t visit = task->visit_begin;
        for (; visit + SEARCH_QUERIES <= task->visit_end; visit += SEARCH_QUERIES)
            look(Int<SEARCH_QUERIES>(), visit);
        for (; visit < task->visit_end; visit++) look(Int<1>(), visit);
    }
}

}  // namespace LEVEL
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern const SearchKernels JOIN(LEVEL, _search);
const SearchKernels JOIN(LEVEL, _search) = {LEVEL::SEARCH_TILE, LEVEL::search_scratch,
                                            LEVEL::search};
