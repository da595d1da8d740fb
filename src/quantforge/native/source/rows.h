// Rows read as they lie: a lane holds the channels of one dword, nothing is transposed.
//
// A block of LANES dwords is 4 * FIELDS vectors of LANES values, in the order of row_order.h:
//
//     vector 4 b + f  (4 bits: 2 b + f)   field f of byte b of every dword
//
// Loaded from b bytes further on, byte b of each dword lies in the lowest bits and needs no shift.
// Instructions per LANES values at 4 bits: AVX-512 1/2 load, 1/2 shift, 1 lookup; AVX2 3 shuffles
// and 1/2 for the nibbles, by bytes (vector_avx2.h).
#pragma once

#include "decode.h"
#include "row_order.h"

namespace LEVEL {

// Rows that share a load of the query, where there are registers for it.
constexpr int ROWS = Vector::MAX_ACCUMULATORS >= 16 ? 4 : 1;
constexpr int ROW_QUERIES = 4;  // queries that share a decoded vector
// Query rows for which decoding again for each ROW_QUERIES costs less than decoding into memory.
constexpr int FEW_ROWS = ROWS > 1 ? 8 : 4;
// Bytes between what is read and what is asked of memory: a row at a time, for requests in bursts
// fill the buffers of the core and then wait in front of the loads.
constexpr int AHEAD = 4096;

static INLINE int64_t ahead_of(const Rows &rows, int64_t bytes) {
    return (AHEAD + bytes - 1) / bytes * rows.stride;
}
static INLINE void prefetch(const uint8_t *at, int64_t ahead) {
    __builtin_prefetch((const void *)((uintptr_t)at + (uintptr_t)ahead));
}

template <int WIDTH> struct RowDecoder {
    static constexpr int FIELDS = 8 / WIDTH, VECTORS = 4 * FIELDS, PARTS = VECTORS / 4;
    static constexpr bool BY_BYTES = WIDTH == 4 && Vector::SPLIT_LOOKUP;
    typename Vector::template Lookup<WIDTH> lookup;
    Vector::SplitLookup split;

    explicit RowDecoder(const float *table) : lookup(table), split(table) {}

    // Vector V of a block; FULL: the block has LANES dwords and 3 more bytes may be read.
    template <int V, bool FULL> INLINE F vector(const uint8_t *at, int left) const {
        constexpr int BYTE = V / FIELDS, FIELD = V % FIELDS;
        const I word = FULL ? Vector::iload(at + BYTE)
                            : Vector::shift_right<8 * BYTE>(Vector::load_some(at, left));
        return lookup(Vector::shift_right<WIDTH * FIELD>(word));
    }
    // Vectors 4 PART .. 4 PART + 3.
    template <int PART, bool FULL>
    INLINE void part(const uint8_t *at, int left, F out[4]) const {
        if constexpr (BY_BYTES) {
            const I word = FULL ? Vector::iload(at) : Vector::load_some(at, left);
            split(Vector::bit_and(Vector::shift_right<4 * PART>(word), Vector::iset1(0x0F0F0F0F)),
                  out);
        } else {
            unrolled<0, 4>([&](auto k) __attribute__((always_inline)) {
                constexpr int AT = decltype(k)::value;
                out[AT] = vector<4 * PART + AT, FULL>(at, left);
            });
        }
    }
};

// Call body(Int<full>, begin, left) for each block of a row; its dwords are [begin, begin + left).
template <class Body>
static INLINE void for_blocks(int64_t dwords, bool may_overread, const Body &body) {
    for (int64_t begin = 0; begin < dwords; begin += LANES) {
        const int64_t left = dwords - begin;
        if (left > LANES || (left == LANES && may_overread)) body(Int<1>(), begin, LANES);
        else body(Int<0>(), begin, (int)smaller(left, LANES));
    }
}

// sums[q][row] = products, lanes apart, of ROWS rows with QUERIES queries (block, vector, q, lane).
template <int WIDTH, int QUERIES>
static INLINE void dot_rows(const RowDecoder<WIDTH> &decoder, const uint8_t *const row[ROWS],
                            int64_t dwords, bool may_overread, int64_t ahead, const float *query,
                            F sums[QUERIES][ROWS]) {
    // a chain of additions would wait for itself
    constexpr int CHAINS = QUERIES * ROWS < 4 ? 4 : QUERIES * ROWS < 8 ? 2 : 1;
    F chain[CHAINS][QUERIES][ROWS];
    unrolled<0, CHAINS * QUERIES * ROWS>([&](auto k) __attribute__((always_inline)) {
        (&chain[0][0][0])[decltype(k)::value] = Vector::zero();
    });
    for_blocks(dwords, may_overread, [&](auto full, int64_t begin, int left)
                                         __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        unrolled<0, ROWS>([&](auto r) __attribute__((always_inline)) {
            prefetch(row[decltype(r)::value] + 4 * begin, ahead);
        });
        unrolled<0, RowDecoder<WIDTH>::PARTS>([&](auto p) __attribute__((always_inline)) {
            constexpr int PART = decltype(p)::value;
            const float *q = query + 4 * PART * QUERIES * LANES;
            const auto add = [&](auto k, auto i, int r, F x) __attribute__((always_inline)) {
                constexpr int AT = decltype(k)::value, Q = decltype(i)::value;
                F &sum = chain[AT % CHAINS][Q][r];
                sum = Vector::fma(x, Vector::load(q + (AT * QUERIES + Q) * LANES), sum);
            };
            if constexpr (RowDecoder<WIDTH>::BY_BYTES) {
                unrolled<0, ROWS>([&](auto r) __attribute__((always_inline)) {
                    constexpr int R = decltype(r)::value;
                    F x[4];
                    decoder.template part<PART, FULL>(row[R] + 4 * begin, left, x);
                    unrolled<0, 4 * QUERIES>([&](auto k) __attribute__((always_inline)) {
                        constexpr int AT = decltype(k)::value / QUERIES;
                        add(Int<AT>(), Int<decltype(k)::value % QUERIES>(), R, x[AT]);
                    });
                });
            } else {
                unrolled<0, 4>([&](auto k) __attribute__((always_inline)) {
                    constexpr int AT = decltype(k)::value;
                    F x[ROWS];
                    unrolled<0, ROWS>([&](auto r) __attribute__((always_inline)) {
                        constexpr int R = decltype(r)::value;
                        x[R] = decoder.template vector<4 * PART + AT, FULL>(row[R] + 4 * begin,
                                                                           left);
                    });
                    unrolled<0, QUERIES * ROWS>([&](auto i) __attribute__((always_inline)) {
                        constexpr int Q = decltype(i)::value / ROWS, R = decltype(i)::value % ROWS;
                        add(k, Int<Q>(), R, x[R]);
                    });
                });
            }
        });
        query += RowDecoder<WIDTH>::VECTORS * QUERIES * LANES;
    });
    unrolled<0, QUERIES * ROWS>([&](auto k) __attribute__((always_inline)) {
        constexpr int AT = decltype(k)::value;
        F total = (&chain[0][0][0])[AT];
        unrolled<1, CHAINS>([&](auto c) __attribute__((always_inline)) {
            total = Vector::add(total, (&chain[decltype(c)::value][0][0])[AT]);
        });
        (&sums[0][0])[AT] = total;
    });
}

// Rows whose products with QUERIES queries fill a vector.
constexpr int rows_at_once(int queries) { return LANES / (ROWS * queries) * ROWS; }

// out[q * KEYS + i]: products of the KEYS = rows_at_once(QUERIES) rows from `first` on; past the
// end the last row stands in.
template <int WIDTH, int QUERIES>
static INLINE F dot_keys(const RowDecoder<WIDTH> &decoder, const Packed &packed, int64_t group,
                         int64_t first, int64_t n, int64_t dwords, int64_t ahead,
                         const float *query) {
    constexpr int KEYS = rows_at_once(QUERIES);
    const bool may_overread = first + KEYS < n && packed.rows.stride >= 4 * dwords;
    const uint8_t *start = packed.rows.data + packed.rows.offsets[group];
    F sums[LANES];
    for (int i = QUERIES * KEYS; i < LANES; i++) sums[i] = Vector::zero();
    for (int i = 0; i < KEYS; i += ROWS) {
        const uint8_t *row[ROWS];
        for (int r = 0; r < ROWS; r++)
            row[r] = start + smaller(first + i + r, n - 1) * packed.rows.stride;
        F part[QUERIES][ROWS];
        dot_rows<WIDTH, QUERIES>(decoder, row, dwords, may_overread, ahead, query, part);
        for (int q = 0; q < QUERIES; q++)
            for (int r = 0; r < ROWS; r++) sums[q * KEYS + i + r] = part[q][r];
    }
    return Vector::sums_of(sums);
}

}  // namespace LEVEL
