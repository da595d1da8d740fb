// Four float lanes in plain C++, for processors without AVX2 (compilers make SSE2 or NEON of it).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace LEVEL {

struct Vector {
    static constexpr int LANES = 4;
    static constexpr int MAX_ACCUMULATORS = 8;
    static constexpr bool SPLIT_LOOKUP = false;
    struct SplitLookup {
        explicit SplitLookup(const float *) {}
    };
    typedef float F __attribute__((vector_size(16)));
    typedef uint32_t I __attribute__((vector_size(16)));
    typedef int32_t Mask __attribute__((vector_size(16)));

    static F zero() { return set1(0.0f); }
    static F set1(float x) { return F{x, x, x, x}; }
    static F load(const float *p) { return floats(iload(p)); }
    static void store(float *p, F x) { memcpy(p, &x, 16); }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F sqrt(F a) { return F{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
    static F max(F a, F b) { return select(a > b, a, b); }  // b if either is NaN
    static F min(F a, F b) { return select(a < b, a, b); }  // b if either is NaN
    static F fma(F a, F b, F c) { return a * b + c; }
    static F abs(F a) { return floats(bits(a) & 0x7FFFFFFFu); }
    static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
    static float maximum(F a) {
        const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
        return x > y ? x : y;
    }

    static I izero() { return iset1(0); }
    static I iset1(int32_t x) { return I{0, 0, 0, 0} + (uint32_t)x; }
    static I iload(const void *p) {
        I x;
        memcpy(&x, p, 16);
        return x;
    }
    static void istore(void *p, I x) { memcpy(p, &x, 16); }
    static I iadd(I a, I b) { return a + b; }
    static I isub(I a, I b) { return a - b; }
    static I imax(I a, I b) {
        const I greater = (I)((Mask)a > (Mask)b);
        return merge(greater, a, b);
    }
    static I bit_and(I a, I b) { return a & b; }
    static I bit_or(I a, I b) { return a | b; }
    template <int N> static I shift_right(I a) { return a >> N; }
    template <int N> static I shift_left(I a) { return a << N; }
    static I shift_left(I a, int n) { return a << n; }
    static I shift_right(I a, int n) { return a >> n; }
    static I rotate_right(I a, int32_t n) { return n ? (a >> n) | (a << (32 - n)) : a; }
    // Bits of a where the mask is one, of b elsewhere.
    static I merge(I mask, I a, I b) { return (mask & a) | (~mask & b); }
    static I bits(F a) { return (I)a; }
    static F floats(I a) { return (F)a; }
    static I round(F a) {
        I x;
        for (int i = 0; i < 4; i++) x[i] = (uint32_t)(int32_t)nearbyintf(a[i]);
        return x;
    }
    static F convert(I a) { return __builtin_convertvector((Mask)a, F); }

    static Mask greater(F a, F b) { return a > b; }
    static Mask equal(F a, F b) { return a == b; }
    static F select(Mask m, F yes, F no) { return floats(merge((I)m, bits(yes), bits(no))); }
    // 2 * index + (m ? 1 : 0)
    static I descend(I index, Mask m) { return index + index - (I)m; }

    static I load_some(const void *p, int count) {
        I x = izero();
        memcpy(&x, p, 4 * (size_t)count);
        return x;
    }
    static void store_some(void *p, I x, int count) { memcpy(p, &x, 4 * (size_t)count); }

    static float half_to_float(uint16_t h) {
        const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
        uint32_t word;
        if (rest >= 0x7C00) {
            word = 0x7F800000u | (rest & 0x3FF) << 13;
        } else if (rest >= 0x400) {
            word = (rest << 13) + (112u << 23);
        } else {  // zero and denormals: exact in float32
            const float small = (float)rest * 5.9604644775390625e-8f;
            memcpy(&word, &small, 4);
        }
        word |= sign;
        float x;
        memcpy(&x, &word, 4);
        return x;
    }
    static uint16_t float_to_half(float x) {
        uint32_t word;
        memcpy(&word, &x, 4);
        const uint32_t sign = word >> 16 & 0x8000;
        word &= 0x7FFFFFFFu;
        if (word > 0x7F800000u) return (uint16_t)(sign | 0x7E00 | (word >> 13 & 0x1FF));
        if (word >= 0x477FF000u) return (uint16_t)(sign | 0x7C00);  // rounds to 2^16 or more
        if (word < 0x38800000u) {  // below 2^-14: adding 1/2 rounds at the last denormal bit
            float magic;
            memcpy(&magic, &word, 4);
            magic += 0.5f;
            memcpy(&word, &magic, 4);
            return (uint16_t)(sign | (word - 0x3F000000u));
        }
        word += 0xFFF + (word >> 13 & 1);
        return (uint16_t)(sign | (word - (112u << 23)) >> 13);
    }
    static F from_half(const uint16_t *p) {
        F x;
        for (int i = 0; i < 4; i++) x[i] = half_to_float(p[i]);
        return x;
    }

    static void transpose(I r[LANES]) {
        const I a = r[0], b = r[1], c = r[2], d = r[3];
        for (int i = 0; i < 4; i++) r[i] = I{a[i], b[i], c[i], d[i]};
    }

    // Lane i: the sum of the lanes of r[i].
    static F sums_of(const F r[LANES]) { return F{sum(r[0]), sum(r[1]), sum(r[2]), sum(r[3])}; }
    static I sums_of(const I r[LANES]) {
        I x;
        for (int i = 0; i < LANES; i++) x[i] = r[i][0] + r[i][1] + r[i][2] + r[i][3];
        return x;
    }

    // table[index mod 2^BITS]; tables shorter than 16 are repeated up to 16 by the caller.
    template <int BITS> struct Lookup {
        const float *table;
        explicit Lookup(const float *t) : table(t) {}
        F operator()(I index) const {
            const I inside = index & ((1u << BITS) - 1);
            return F{table[inside[0]], table[inside[1]], table[inside[2]], table[inside[3]]};
        }
    };

    // ---- int8: four channels of a row to a dword lane ------------------------------------------
    static constexpr int QUERY_WORDS = 2;  // channels 0 and 2, then 1 and 3, as int16
    static constexpr int OFFSET = 0;
    static constexpr int MAX_QUERY = 2047;
    struct Bytes {
        Mask even_low, even_high, odd_low, odd_high;
    };
    struct ByteTable {
        const uint8_t *table;
        explicit ByteTable(const uint8_t *t) : table(t) {}
        I operator()(I index) const {
            uint8_t byte[16];
            memcpy(byte, &index, 16);
            for (int i = 0; i < 16; i++) byte[i] = table[byte[i] & 15];
            return iload(byte);
        }
    };
    static Bytes prepare(I x) {
        const Mask word = (Mask)x;
        return {word << 24 >> 24, word << 8 >> 24, word << 16 >> 24, word >> 24};
    }
    static I dot(I sum, Bytes x, const int32_t *query) {
        const Mask even = x.even_low * (int16_t)query[0] + x.even_high * (query[0] >> 16);
        const Mask odd = x.odd_low * (int16_t)query[1] + x.odd_high * (query[1] >> 16);
        return sum + (I)even + (I)odd;
    }
    // The same with a query word of its own for each lane.
    static I dot_lanes(I sum, Bytes x, const int32_t *query) {
        const Mask q0 = (Mask)iload(query), q1 = (Mask)iload(query + LANES);
        const Mask even = x.even_low * (q0 << 16 >> 16) + x.even_high * (q0 >> 16);
        const Mask odd = x.odd_low * (q1 << 16 >> 16) + x.odd_high * (q1 >> 16);
        return sum + (I)even + (I)odd;
    }

    // ---- integers of search.h ------------------------------------------------------------------
    static constexpr bool HALF_TURN = false;
    static void turn_four(const uint8_t *const *, int64_t, uint32_t *) {}
    static I blend_bytes(I sign, I yes, I no) {
        typedef int8_t Signs __attribute__((vector_size(16)));
        return merge((I)((Signs)sign < 0), yes, no);
    }
    // Sums of products of unsigned bytes with a query's bytes: here in 32 bits at once.
    static I short_dot(I sums, I values, int32_t query) {
        const uint32_t q = (uint32_t)query;
        return sums + (values & 0xFFu) * (uint32_t)(int8_t)q
             + (values >> 8 & 0xFFu) * (uint32_t)(int8_t)(q >> 8)
             + (values >> 16 & 0xFFu) * (uint32_t)(int8_t)(q >> 16)
             + (values >> 24) * (uint32_t)(int8_t)(q >> 24);
    }
    static I widen(I total, I sums) { return total + sums; }
    static I pair_dot(I total, I pairs, int32_t query) {
        const Mask low = ((Mask)pairs << 16 >> 16) * (int16_t)query;
        return total + (I)low + (I)(((Mask)pairs >> 16) * (query >> 16));
    }
    static Mask at_least(F a, F b) { return a >= b; }
    static uint32_t bits_of(Mask m) {
        return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
    }
};

}  // namespace LEVEL
