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

#include "search_codes.h"

namespace LEVEL {

constexpr int SEARCH_W = 4;  // vectors of rows per tile
constexpr int SEARCH_TILE = SEARCH_W * LANES;
constexpr int ONE_W = 2;  // of them at once for one query: what a step costs besides is shared
constexpr int SEARCH_QUERIES = Vector::MAX_ACCUMULATORS >= 16 ? 4 : 2;

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

// Rows that one query has not left after the first groups: they are finished LANES at a time,
// so that a row which is left costs nothing.
struct Survivors {
    SomeRows rows;
    alignas(64) float totals[LANES];
    int count = 0;

    // `bits` of the vector of rows from `first` on, with their totals.
    INLINE void take(const SearchArgs &a, const SearchTask &task, int64_t part, uint32_t *dwords,
                     uint32_t bits, int64_t first, F total) {
        float each[LANES];
        Vector::store(each, total);
        for (; bits; bits &= bits - 1) {
            const int i = __builtin_ctz(bits);
            rows.row[count] = first + i;
            totals[count++] = each[i];
            if (count == LANES) finish(a, task, part, dwords);
        }
    }

    __attribute__((noinline)) void finish(const SearchArgs &a, const SearchTask &task,
                                          int64_t part, uint32_t *dwords) {
        if (!count) return;
        const int64_t visit = task.visit_begin, query = a.visitors ? a.visitors[visit] : visit;
        uint16_t half[2][LANES];
        rows.last = 0;
        for (int i = 0; i < LANES; i++) {
            if (i >= count) rows.row[i] = rows.row[0], totals[i] = 0;
            rows.last = rows.row[i] > rows.last ? rows.row[i] : rows.last;
            half[0][i] = a.scales[rows.row[i]];
            half[1][i] = a.offsets[rows.row[i]];
        }
        F total = Vector::load(totals);
        add_codes<1>(a, a.lead, a.count, &rows, dwords, query, &total);
        const F offsets = Vector::mul(Vector::from_half(half[1]), Vector::set1(a.unit));
        const F scaled = Vector::mul(total, Vector::from_half(half[0]));
        float scores[LANES];
        Vector::store(scores, Vector::add(Vector::add(scaled, offsets),
                                          Vector::set1(a.base[visit])));
        Best best = a.best_of(part, query);
        for (int i = 0; i < count; i++)
            if (scores[i] > -__builtin_inff()) best.offer(scores[i], rows.row[i]);
        count = 0;
    }
};

// A tile for one query: nothing is decoded to memory.
static INLINE void search_one(const SearchArgs &a, const SearchTask &task, int64_t part,
                              int64_t first, int64_t count, const SearchTile &t,
                              uint32_t *dwords, Survivors &survivors) {
    const int64_t visit = task.visit_begin, query = a.visitors ? a.visitors[visit] : visit;
    const float base = a.base[visit];
    Best best = a.best_of(part, query);
    for (int pair = 0; pair * LANES < count; pair += ONE_W) {
        SomeRows rows[ONE_W];
        F totals[ONE_W];
        for (int i = 0; i < ONE_W; i++) {
            rows[i] = SomeRows::from(first + (pair + i) * LANES, task.end);
            totals[i] = Vector::zero();
        }
        add_codes<ONE_W>(a, 0, a.lead, rows, dwords, query, totals);
        for (int i = 0; i < ONE_W; i++) {
            const int w = pair + i;
            if (a.lead == a.count) {
                keep(best, totals[i], t, w, first, base);
                continue;
            }
            const F least = Vector::set1(least_of(best, t, base));
            uint32_t bits = may_be_good(totals[i], t, w, Vector::set1(a.query_rests[query]), least);
            if (bits) {  // a limit of -inf lets pass what may not be found
                const F offsets = Vector::load(t.offsets + w * LANES);
                bits &= Vector::bits_of(Vector::greater(offsets, Vector::set1(-__builtin_inff())));
                survivors.take(a, task, part, dwords, bits, first + w * LANES, totals[i]);
            }
        }
    }
}

// Neighbouring rows are alike where an index was filled document by document. Far apart from each
// other, tiles soon show what a good score is, and more rows are left: runs of tiles are visited
// in steps that share no factor with their number.
constexpr int64_t RUN = 8 * SEARCH_TILE;

template <class Body> static INLINE void each_tile(int64_t begin, int64_t end, const Body &body) {
    const int64_t runs = (end - begin + RUN - 1) / RUN;
    int64_t step = runs * 5 / 8;
    for (int64_t a = step, b = runs; runs > 1; a = ++step, b = runs) {
        while (b) {
            const int64_t rest = a % b;
            a = b, b = rest;
        }
        if (a == 1) break;
    }
    for (int64_t i = 0, run = 0; i < runs; i++, run = (run + step) % runs) {
        const int64_t stop = smaller(end, begin + (run + 1) * RUN);
        for (int64_t first = begin + run * RUN; first < stop; first += SEARCH_TILE) body(first);
    }
}

static size_t search_scratch(const SearchArgs *a) {
    return 4 * (size_t)a->word_count * SEARCH_TILE + 4 * (size_t)turned_size(*a) * ONE_W + 1024
         + sizeof(SearchTile);
}

static void search(const SearchArgs *args, const SearchTask *task, int64_t part, void *memory) {
    const SearchArgs &a = *args;
    Scratch scratch{(uint8_t *)memory};
    uint32_t *values = scratch.take<uint32_t>(a.lead_words * SEARCH_TILE);
    uint32_t *others = scratch.take<uint32_t>((a.word_count - a.lead_words) * SEARCH_TILE);
    uint32_t *dwords = scratch.take<uint32_t>(turned_size(a) * ONE_W);
    SearchTile &tile = *scratch.take<SearchTile>(1);
    const bool rest = a.lead < a.count;
    const int64_t rest_size = (a.word_count - a.lead_words) * LANES;
    const bool one = task->visit_end - task->visit_begin == 1;
    Survivors survivors;
    each_tile(task->begin, task->end, [&](int64_t first) __attribute__((always_inline)) {
        const int64_t count = smaller(SEARCH_TILE, task->end - first);
        load_tile(a, first, count, tile);
        if (one) {
            search_one(a, *task, part, first, count, tile, dwords, survivors);
            return;
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
    });
    if (one) survivors.finish(a, *task, part, dwords);
}

}  // namespace LEVEL
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern const SearchKernels JOIN(LEVEL, _search);
const SearchKernels JOIN(LEVEL, _search) = {LEVEL::SEARCH_TILE, LEVEL::search_scratch,
                                            LEVEL::search};
