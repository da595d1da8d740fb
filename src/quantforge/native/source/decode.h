// Packed rows to values, one row to a lane: the only reader of codes.
//
//     rows (bytes)                 after a transpose of dwords          values
//     row 0:  d0 d1 d2 ...         d0:  row 0 | row 1 | ... | row L-1   channel c: L rows
//     row 1:  d0 d1 d2 ...         d1:  ...
//
// Every field of a dword is then the code of one channel for L rows at once, whatever the bits and
// the dim, and a table lookup in registers takes as index the dword shifted right: it ignores the
// bits above. Instructions per L values at 4 bits, the store apart: AVX-512 1/2 for the transpose,
// 7/8 shift, 1 lookup; AVX2 3/8 for the transpose and 3.6 with the lookup by bytes.
#pragma once

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace LEVEL {

template <int N> struct Int {
    static constexpr int value = N;
};
template <int BEGIN, int END, class F> static INLINE void unrolled(const F &f) {
    if constexpr (BEGIN < END) {
        f(Int<BEGIN>());
        unrolled<BEGIN + 1, END>(f);
    }
}

constexpr int LANES = Vector::LANES;
typedef Vector::F F;
typedef Vector::I I;

static INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Addresses of LANES rows from `first` on; past the end the last row stands in.
static INLINE void row_addresses(const Rows &rows, int64_t group, int64_t first, int64_t n,
                                 const uint8_t *address[LANES]) {
    const uint8_t *start = rows.data + rows.offsets[group];
    for (int i = 0; i < LANES; i++) {
        address[i] = start + smaller(first + i, n - 1) * rows.stride;
    }
}

// Hint that rows [first, first + count) will be read soon.
static INLINE void prefetch_rows(const Rows &rows, int64_t group, int64_t first, int64_t count,
                                 int64_t n, int bytes) {
    const uint8_t *start = rows.data + rows.offsets[group];
    const int64_t end = smaller(first + count, n);
    if (rows.stride == bytes) {
        for (const uint8_t *p = start + first * bytes; p < start + end * bytes; p += 64)
            __builtin_prefetch(p);
        return;
    }
    for (int64_t i = first; i < end; i++)
        for (int b = 0; b < bytes; b += 64) __builtin_prefetch(start + i * rows.stride + b);
}

// Load dwords [begin, begin + LANES) of LANES rows and transpose them.
static INLINE void load_dwords(const uint8_t *const row[LANES], int64_t begin, int64_t end,
                               I dword[LANES]) {
    const int64_t count = end - begin;
    if (count >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) dword[i] = Vector::iload(row[i] + 4 * begin);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            dword[i] = Vector::load_some(row[i] + 4 * begin, (int)count);
    }
    Vector::transpose(dword);
}

// Nibbles of a dword to channels 4 d .. 4 d + 3 of both halves of the row; out: channel 4 d.
template <int64_t STRIDE, class SplitLookup>
static INLINE void decode_nibbles(const SplitLookup &lookup, I word, int64_t plane, float *out) {
    const I mask = Vector::iset1(0x0F0F0F0F);
    word = SplitLookup::by_channel(word);
    F low[4], high[4];
    lookup(Vector::bit_and(word, mask), low);
    lookup(Vector::bit_and(Vector::shift_right<4>(word), mask), high);
    unrolled<0, 4>([&](auto b) __attribute__((always_inline)) {
        constexpr int BYTE = decltype(b)::value;
        Vector::store(out + BYTE * STRIDE, low[BYTE]);
        Vector::store(out + (BYTE + plane) * STRIDE, high[BYTE]);
    });
}

// One plane of width BITS: bits 1, 2, 4, 8.
template <int BITS, int64_t STRIDE, class V = Vector>
static INLINE void decode_plane(const Layout &layout, const float *table,
                                const uint8_t *const row[LANES], float *values) {
    constexpr bool SPLIT = BITS == 4 && V::SPLIT_LOOKUP;
    const typename V::template Lookup<BITS> lookup(table);
    const typename V::SplitLookup split(table);
    constexpr int FIELDS = 8 / BITS;
    const int plane = layout.plane[0].stride, dim = layout.dim;
    // dwords whose 4 * FIELDS fields are all channels
    const int64_t last_start = smaller(plane, dim - (FIELDS - 1) * plane);
    const int64_t full = last_start / 4;
    for (int64_t begin = 0; begin < layout.dwords; begin += LANES) {
        I dword[LANES];
        load_dwords(row, begin, layout.dwords, dword);
        const int64_t end = smaller(begin + LANES, layout.dwords);
        for (int64_t d = begin; d < end; d++) {
            const I word = dword[d - begin];
            float *out = values + 4 * d * STRIDE;
            if constexpr (SPLIT) {
                if (d < full) {
                    decode_nibbles<STRIDE>(split, word, plane, out);
                    continue;
                }
            }
            if (d < full) {
                unrolled<0, 4 * FIELDS>([&](auto k) __attribute__((always_inline)) {
                    constexpr int BYTE = decltype(k)::value / FIELDS;
                    constexpr int FIELD = decltype(k)::value % FIELDS;
                    const I index = Vector::shift_right<8 * BYTE + BITS * FIELD>(word);
                    Vector::store(out + (BYTE + FIELD * (int64_t)plane) * STRIDE, lookup(index));
                });
                continue;
            }
            for (int k = 0; k < 4 * FIELDS; k++) {
                const int64_t byte = 4 * d + k / FIELDS;
                const int64_t channel = byte + (int64_t)(k % FIELDS) * plane;
                if (byte >= plane || channel >= dim) continue;
                const I index = Vector::shift_right(word, 8 * (k / FIELDS) + BITS * (k % FIELDS));
                Vector::store(values + channel * STRIDE, lookup(index));
            }
        }
    }
}

// Several planes: bits 3, 5, 6, 7. `dwords` is scratch for layout.dwords vectors.
template <int BITS, int64_t STRIDE>
static INLINE void decode_planes(const Layout &layout, const float *table,
                                 const uint8_t *const row[LANES], float *values,
                                 uint32_t *dwords) {
    const Vector::Lookup<BITS> lookup(table);
    constexpr int PLANES = BITS == 7 ? 3 : 2;
    constexpr int FIRST = BITS == 3 ? 2 : 4;
    for (int64_t begin = 0; begin < layout.dwords; begin += LANES) {
        I dword[LANES];
        load_dwords(row, begin, layout.dwords, dword);
        const int64_t end = smaller(begin + LANES, layout.dwords);
        for (int64_t d = begin; d < end; d++)
            Vector::istore(dwords + d * LANES, dword[d - begin]);
    }
    const int dim = layout.dim;
    const I low = Vector::iset1((1 << FIRST) - 1), middle = Vector::iset1(3 << FIRST);
    const int32_t *at = layout.dword, *rotation = layout.rotation;
    const auto field = [&](int64_t k) __attribute__((always_inline)) {
        return Vector::rotate_right(Vector::iload(dwords + (int64_t)at[k] * LANES), rotation[k]);
    };
    for (int64_t c = 0; c < dim; c++) {
        I high = field(dim + c);
        if constexpr (PLANES == 3) high = Vector::merge(middle, high, field(2 * dim + c));
        Vector::store(values + c * STRIDE, lookup(Vector::merge(low, field(c), high)));
    }
}

// STRIDE: floats from one channel to the next.
template <int BITS, int64_t STRIDE>
static INLINE void decode(const Layout &layout, const float *table,
                          const uint8_t *const row[LANES], float *values, uint32_t *dwords) {
    if constexpr (BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8) {
        decode_plane<BITS, STRIDE>(layout, table, row, values);
    } else {
        decode_planes<BITS, STRIDE>(layout, table, row, values, dwords);
    }
}

// Decode W * LANES rows from `first` on to values (dim, W * LANES).
template <int BITS, int W>
static void decode_tile_of(const Layout &layout, const Packed &packed, int64_t group, int64_t first,
                           int64_t n, float *values, uint32_t *dwords) {
    for (int w = 0; w < W; w++) {
        const uint8_t *row[LANES];
        row_addresses(packed.rows, group, first + w * LANES, n, row);
        decode<BITS, W * LANES>(layout, packed.code->centroids, row, values + w * LANES,
                                dwords);
    }
}

template <int W>
static void decode_tile(const Layout &layout, const Packed &packed, int64_t group, int64_t first,
                        int64_t n, float *values, uint32_t *dwords) {
    switch (layout.bits) {
#define CASE(BITS)                                                                               \
    case BITS: return decode_tile_of<BITS, W>(layout, packed, group, first, n, values, dwords);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

// Scales of rows [first, first + count) times `factor`, zeros up to `total`; column 0.
static INLINE void load_scales(const Packed &packed, int64_t group, int64_t first, int64_t count,
                               int64_t total, float factor, float *out) {
    const uint8_t *p = packed.scales.data + packed.scales.offsets[group];
    const int64_t stride = packed.scales.stride;
    p += first * stride;
    if (packed.code->wide_scales) {
        for (int64_t i = 0; i < count; i++) out[i] = factor * *(const float *)(p + i * stride);
    } else if (stride == 2 && count == total) {
        const F times = Vector::set1(factor);
        for (int64_t i = 0; i < total; i += LANES)
            Vector::store(out + i, Vector::mul(times, Vector::from_half((const uint16_t *)p + i)));
    } else {
        for (int64_t i = 0; i < count; i++)
            out[i] = factor * Vector::half_to_float(*(const uint16_t *)(p + i * stride));
    }
    for (int64_t i = count; i < total; i++) out[i] = 0;
}

// Cut scratch memory into arrays.
struct Scratch {
    uint8_t *next;
    template <class T> T *take(int64_t count) {
        T *result = (T *)next;
        next += (count * sizeof(T) + 63) / 64 * 64;
        return result;
    }
};

}  // namespace LEVEL
