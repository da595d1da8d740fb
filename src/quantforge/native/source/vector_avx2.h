// Eight float lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace LEVEL {

struct Vector {
    static constexpr int LANES = 8;
    static constexpr int MAX_ACCUMULATORS = 12;  // of 16 registers
    typedef __m256 F;
    typedef __m256i I;
    typedef __m256 Mask;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, F x) { _mm256_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b if either is NaN
    static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b if either is NaN
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static float sum(F a) {
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
    }
    static float maximum(F a) {
        __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
    }

    static I izero() { return _mm256_setzero_si256(); }
    static I iset1(int32_t x) { return _mm256_set1_epi32(x); }
    static I iload(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
    static void istore(void *p, I x) { _mm256_storeu_si256((__m256i *)p, x); }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
    static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
    template <int N> static I shift_right(I a) { return _mm256_srli_epi32(a, N); }
    template <int N> static I shift_left(I a) { return _mm256_slli_epi32(a, N); }
    static I shift_left(I a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
    static I shift_right(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
    static I rotate_right(I a, int32_t n) {
        return bit_or(shift_right(a, n), shift_left(a, 32 - n));  // a shift by 32 gives 0
    }
    // Bits of a where the mask is one, of b elsewhere.
    static I merge(I mask, I a, I b) {
        return bit_or(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
    }
    static I bits(F a) { return _mm256_castps_si256(a); }
    static F floats(I a) { return _mm256_castsi256_ps(a); }
    static I round(F a) { return _mm256_cvtps_epi32(a); }
    static F convert(I a) { return _mm256_cvtepi32_ps(a); }

    static Mask greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
    static Mask equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
    static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
    // 2 * index + (m ? 1 : 0)
    static I descend(I index, Mask m) {
        return _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(m));
    }

    static I first(int count) {
        const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    }
    static I load_some(const void *p, int count) {
        return _mm256_maskload_epi32((const int *)p, first(count));
    }
    static void store_some(void *p, I x, int count) {
        _mm256_maskstore_epi32((int *)p, first(count), x);
    }

    static F from_half(const uint16_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    }
    static float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
    static uint16_t float_to_half(float x) { return _cvtss_sh(x, 0); }

    // 8 x 8 transpose of dwords.
    static inline __attribute__((always_inline)) void transpose(I r[LANES]) {
        I t[8], u[8];
#pragma GCC unroll 16
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 8; i += 4) {
            u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
#pragma GCC unroll 16
        for (int c = 0; c < 4; c++) {
            r[c] = _mm256_permute2x128_si256(u[c], u[4 + c], 0x20);
            r[4 + c] = _mm256_permute2x128_si256(u[c], u[4 + c], 0x31);
        }
    }

    // Lane i: the sum of the lanes of r[i].
    static F sums_of(const F r[LANES]) {
        const F a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
        const F b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
        return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    static I sums_of(const I r[LANES]) {
        const I a = _mm256_hadd_epi32(_mm256_hadd_epi32(r[0], r[1]), _mm256_hadd_epi32(r[2], r[3]));
        const I b = _mm256_hadd_epi32(_mm256_hadd_epi32(r[4], r[5]), _mm256_hadd_epi32(r[6], r[7]));
        return iadd(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }

    // table[index mod 2^BITS]; tables shorter than 16 are repeated up to 16 by the caller.
    template <int BITS> struct Lookup {
        const float *table;
        explicit Lookup(const float *t) : table(t) {}
        F operator()(I index) const {
            const I inside = bit_and(index, iset1((1 << BITS) - 1));
            return _mm256_i32gather_ps(table, inside, 4);
        }
    };

    // Sixteen floats by their bytes. A byte shuffle costs a third of a lookup across lanes on most
    // processors, and looks 32 nibbles up:
    //
    //     nibbles    4 channels x 4 rows in each half, rows of a channel side by side
    //     4 shuffles the bytes 0, 1, 2, 3 of their floats; 8 interleavings make floats of them
    static constexpr bool SPLIT_LOOKUP = true;
    struct SplitLookup {
        I byte[4];
        explicit SplitLookup(const float *table) {
            const __m128i gather =
                _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            __m128i x[4];
            for (int i = 0; i < 4; i++)
                x[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 4 * i)), gather);
            const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpacklo_epi32(x[2], x[3]);
            const __m128i c = _mm_unpackhi_epi32(x[0], x[1]), d = _mm_unpackhi_epi32(x[2], x[3]);
            byte[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
            byte[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
            byte[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d));
            byte[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d));
        }
        // Bring the bytes of the four rows of each half together: 4 channels x 4 rows.
        static I by_channel(I word) {
            const __m128i order =
                _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            return _mm256_shuffle_epi8(word, _mm256_broadcastsi128_si256(order));
        }
        void operator()(I nibbles, F out[4]) const {
            const I b0 = _mm256_shuffle_epi8(byte[0], nibbles);
            const I b1 = _mm256_shuffle_epi8(byte[1], nibbles);
            const I b2 = _mm256_shuffle_epi8(byte[2], nibbles);
            const I b3 = _mm256_shuffle_epi8(byte[3], nibbles);
            const I low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
            out[0] = floats(_mm256_unpacklo_epi16(low, high));
            out[1] = floats(_mm256_unpackhi_epi16(low, high));
            const I low2 = _mm256_unpackhi_epi8(b0, b1), high2 = _mm256_unpackhi_epi8(b2, b3);
            out[2] = floats(_mm256_unpacklo_epi16(low2, high2));
            out[3] = floats(_mm256_unpackhi_epi16(low2, high2));
        }
    };

    // ---- int8: four channels of a row to a dword lane ------------------------------------------
    static constexpr int QUERY_WORDS = 2;  // channels 0 and 2, then 1 and 3, as int16
    static constexpr int OFFSET = 0;
    static constexpr int MAX_QUERY = 2047;
    struct Bytes {
        I even, odd;
    };
    struct ByteTable {
        I table;
        explicit ByteTable(const uint8_t *t)
            : table(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t))) {}
        I operator()(I index) const { return _mm256_shuffle_epi8(table, index); }
    };
    static Bytes prepare(I x) {
        return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
    }
    static I dot(I sum, Bytes x, const int32_t *query) {
        const I even = _mm256_madd_epi16(x.even, iset1(query[0]));
        const I odd = _mm256_madd_epi16(x.odd, iset1(query[1]));
        return iadd(sum, iadd(even, odd));
    }
    // The same with a query word of its own for each lane.
    static I dot_lanes(I sum, Bytes x, const int32_t *query) {
        const I even = _mm256_madd_epi16(x.even, iload(query));
        const I odd = _mm256_madd_epi16(x.odd, iload(query + LANES));
        return iadd(sum, iadd(even, odd));
    }

    // ---- integers of search.h ------------------------------------------------------------------
    // Four dwords of eight rows at `byte`, transposed: 4 x 8. A transpose of halves of registers
    // needs no shuffle across them.
    static constexpr bool HALF_TURN = true;
    static inline __attribute__((always_inline)) void turn_four(const uint8_t *const row[LANES],
                                                                int64_t byte, uint32_t *out) {
        I r[4], t[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const I low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(row[i] + byte)));
            r[i] = _mm256_inserti128_si256(
                low, _mm_loadu_si128((const __m128i *)(row[i + 4] + byte)), 1);
        }
        t[0] = _mm256_unpacklo_epi32(r[0], r[1]);
        t[1] = _mm256_unpackhi_epi32(r[0], r[1]);
        t[2] = _mm256_unpacklo_epi32(r[2], r[3]);
        t[3] = _mm256_unpackhi_epi32(r[2], r[3]);
        istore(out, _mm256_unpacklo_epi64(t[0], t[2]));
        istore(out + LANES, _mm256_unpackhi_epi64(t[0], t[2]));
        istore(out + 2 * LANES, _mm256_unpacklo_epi64(t[1], t[3]));
        istore(out + 3 * LANES, _mm256_unpackhi_epi64(t[1], t[3]));
    }
    static I blend_bytes(I sign, I yes, I no) { return _mm256_blendv_epi8(no, yes, sign); }
    // Sums of a few products of unsigned bytes with a query's bytes: pairs, in 16 bits.
    static I short_dot(I sums, I values, int32_t query) {
        return _mm256_add_epi16(sums, _mm256_maddubs_epi16(values, iset1(query)));
    }
    static I widen(I total, I sums) {
        return iadd(total, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    }
    static I pair_dot(I total, I pairs, int32_t query) {
        return iadd(total, _mm256_madd_epi16(pairs, iset1(query)));
    }
    static Mask at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
    static uint32_t bits_of(Mask m) { return (uint32_t)_mm256_movemask_ps(m); }
};

template <> struct Vector::Lookup<4> {
    F low, high;
    explicit Lookup(const float *t) : low(load(t)), high(load(t + 8)) {}
    F operator()(I index) const {
        const F upper = floats(shift_left<28>(index));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                _mm256_permutevar8x32_ps(high, index), upper);
    }
};
template <> struct Vector::Lookup<3> {
    F table;
    explicit Lookup(const float *t) : table(load(t)) {}
    F operator()(I index) const { return _mm256_permutevar8x32_ps(table, index); }
};
template <> struct Vector::Lookup<2> : Vector::Lookup<3> { using Lookup<3>::Lookup; };
template <> struct Vector::Lookup<1> : Vector::Lookup<3> { using Lookup<3>::Lookup; };

}  // namespace LEVEL
