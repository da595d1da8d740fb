// Sixteen float lanes: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace LEVEL {

struct Vector {
    static constexpr int LANES = 16;
    static constexpr int MAX_ACCUMULATORS = 24;  // of 32 registers
    static constexpr bool SPLIT_LOOKUP = false;
    struct SplitLookup {
        explicit SplitLookup(const float *) {}
    };
    typedef __m512 F;
    typedef __m512i I;
    typedef __mmask16 Mask;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
    static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b if either is NaN
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static float maximum(F a) { return _mm512_reduce_max_ps(a); }

    static I izero() { return _mm512_setzero_si512(); }
    static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
    static I iload(const void *p) { return _mm512_loadu_si512(p); }
    static void istore(void *p, I x) { _mm512_storeu_si512(p, x); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
    static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
    template <int N> static I shift_right(I a) { return _mm512_srli_epi32(a, N); }
    template <int N> static I shift_left(I a) { return _mm512_slli_epi32(a, N); }
    static I shift_left(I a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
    static I shift_right(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
    static I rotate_right(I a, int32_t n) { return _mm512_rorv_epi32(a, _mm512_set1_epi32(n)); }
    // Bits of a where the mask is one, of b elsewhere.
    static I merge(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }
    static I bits(F a) { return _mm512_castps_si512(a); }
    static F floats(I a) { return _mm512_castsi512_ps(a); }
    static I round(F a) { return _mm512_cvtps_epi32(a); }
    static F convert(I a) { return _mm512_cvtepi32_ps(a); }

    static Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
    // 2 * index + (m ? 1 : 0)
    static I descend(I index, Mask m) {
        const I twice = _mm512_add_epi32(index, index);
        return _mm512_mask_sub_epi32(twice, m, twice, _mm512_set1_epi32(-1));
    }

    static I load_some(const void *p, int count) {
        return _mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), p);
    }
    static void store_some(void *p, I x, int count) {
        _mm512_mask_storeu_epi32(p, (__mmask16)((1u << count) - 1), x);
    }

    static F from_half(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    }
    static float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
    static uint16_t float_to_half(float x) { return _cvtss_sh(x, 0); }

    // 16 x 16 transpose of dwords.
    static inline __attribute__((always_inline)) void transpose(I r[LANES]) {
        I t[16], u[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 4) {
            u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // u[4 g + c], 128-bit lane l: rows 4 g .. 4 g + 3 of column 4 l + c
#pragma GCC unroll 16
        for (int c = 0; c < 4; c++) {
            const I a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
            const I b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xEE);
            const I d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
            const I e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xEE);
            r[c] = _mm512_shuffle_i32x4(a, d, 0x88);
            r[4 + c] = _mm512_shuffle_i32x4(a, d, 0xDD);
            r[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
            r[12 + c] = _mm512_shuffle_i32x4(b, e, 0xDD);
        }
    }

    // Lane i: the sum of the lanes of r[i]. Each step adds two halves of two vectors into one:
    //
    //     dwords 0, 2 + 1, 3    then 0, 1 + 2, 3    then 128-bit lanes 0, 2 + 1, 3, twice
    template <class Add>
    static inline __attribute__((always_inline)) I sums_by(const I *r, Add plus) {
        I t[8], u[4];
#pragma GCC unroll 16
        for (int i = 0; i < 8; i++) {
            t[i] = plus(_mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]),
                        _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]));
        }
#pragma GCC unroll 16
        for (int i = 0; i < 4; i++) {
            u[i] = plus(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]),
                        _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
        }
        const I a = plus(_mm512_shuffle_i32x4(u[0], u[1], 0x88),
                         _mm512_shuffle_i32x4(u[0], u[1], 0xDD));
        const I b = plus(_mm512_shuffle_i32x4(u[2], u[3], 0x88),
                         _mm512_shuffle_i32x4(u[2], u[3], 0xDD));
        return plus(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    }
    static F sums_of(const F r[LANES]) {
        I x[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = bits(r[i]);
        return floats(sums_by(x, [](I a, I b) __attribute__((always_inline)) {
            return bits(add(floats(a), floats(b)));
        }));
    }
    static I sums_of(const I r[LANES]) {
        return sums_by(r, [](I a, I b) __attribute__((always_inline)) { return iadd(a, b); });
    }

    // table[index mod 2^BITS]; tables shorter than 16 are repeated up to 16 by the caller.
    template <int BITS> struct Lookup {
        Lookup<BITS - 1> low, high;
        explicit Lookup(const float *table) : low(table), high(table + (1 << (BITS - 1))) {}
        F operator()(I index) const {
            const Mask upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << (BITS - 1)));
            return _mm512_mask_blend_ps(upper, low(index), high(index));
        }
    };

    // ---- int8: four channels of a row to a dword lane ------------------------------------------
    static constexpr int QUERY_WORDS = 1;  // four int8
    static constexpr int OFFSET = 128;     // values are stored unsigned, as vpdpbusd wants them
    static constexpr int MAX_QUERY = 127;
    typedef I Bytes;
    struct ByteTable {
        I table;
        explicit ByteTable(const uint8_t *t)
            : table(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)t))) {}
        I operator()(I index) const { return _mm512_shuffle_epi8(table, index); }
    };
    static Bytes prepare(I x) { return x; }
    static I dot(I sum, Bytes x, const int32_t *query) {
        return _mm512_dpbusd_epi32(sum, x, _mm512_set1_epi32(*query));
    }
    // The same with a query word of its own for each lane.
    static I dot_lanes(I sum, Bytes x, const int32_t *query) {
        return _mm512_dpbusd_epi32(sum, x, iload(query));
    }

    // ---- integers of search.h ------------------------------------------------------------------
    static constexpr bool HALF_TURN = false;
    static void turn_four(const uint8_t *const *, int64_t, uint32_t *) {}
    static I blend_bytes(I sign, I yes, I no) {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(sign), no, yes);
    }
    // Sums of products of unsigned bytes with a query's bytes: here in 32 bits at once.
    static I short_dot(I sums, I values, int32_t query) {
        return _mm512_dpbusd_epi32(sums, values, _mm512_set1_epi32(query));
    }
    static I widen(I total, I sums) { return iadd(total, sums); }
    static I pair_dot(I total, I pairs, int32_t query) {
        return _mm512_dpwssd_epi32(total, pairs, _mm512_set1_epi32(query));
    }
    static Mask at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static uint32_t bits_of(Mask m) { return m; }
};

template <> struct Vector::Lookup<5> {
    F low, high;
    explicit Lookup(const float *table) : low(load(table)), high(load(table + 16)) {}
    F operator()(I index) const { return _mm512_permutex2var_ps(low, index, high); }
};
template <> struct Vector::Lookup<4> {
    F table;
    explicit Lookup(const float *t) : table(load(t)) {}
    F operator()(I index) const { return _mm512_permutexvar_ps(index, table); }
};
template <> struct Vector::Lookup<3> : Vector::Lookup<4> { using Lookup<4>::Lookup; };
template <> struct Vector::Lookup<2> : Vector::Lookup<4> { using Lookup<4>::Lookup; };
template <> struct Vector::Lookup<1> : Vector::Lookup<4> { using Lookup<4>::Lookup; };

}  // namespace LEVEL
