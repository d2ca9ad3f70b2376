// Products of signed bytes, four at a time in each 32-bit lane, summed exactly.
//
// VNNI multiplies unsigned with signed bytes, so activations are stored plus 128 there, and 128 times the sum of the
// weights is taken off again at the end. The older instruction adds pairs in 16 bits: there weights lend their signs
// to the activations. All bytes are from -127 to 127.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__)
constexpr int32_t OFFSET = 128;
#else
constexpr int32_t OFFSET = 0;
#endif

#if defined(__AVX512F__)
INLINE vi pairs(vi w, vi x) { return (vi)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)a, (__m512i)b); }
INLINE vi fold_pairs(vi a) { return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__)
INLINE vi pairs(vi w, vi x) { return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
INLINE vi fold_pairs(vi a) { return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
#endif

// Four weights of every lane, as many rows are multiplied with them.
struct Fours {
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
    vi size;
    __mmask64 negative;

    INLINE explicit Fours(vi w) : size((vi)_mm512_abs_epi8((__m512i)w)), negative(_mm512_movepi8_mask((__m512i)w)) {}
#elif defined(__AVX2__) && !defined(__AVX512F__)
    vi size, sign;

    INLINE explicit Fours(vi w) : size((vi)_mm256_abs_epi8((__m256i)w)), sign(w) {}
#else
    vi values;

    INLINE explicit Fours(vi w) : values(w) {}
#endif
};

// acc + the four products in each lane: x as stored, the same four in every lane.
INLINE vi dot4(vi acc, vi x, const Fours& w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w.values);
#elif defined(__AVX512F__)
    const __m512i v = (__m512i)x;
    return acc + fold_pairs(pairs(w.size, (vi)_mm512_mask_sub_epi8(v, w.negative, _mm512_setzero_si512(), v)));
#elif defined(__AVX2__)
    return acc + fold_pairs(pairs(w.size, (vi)_mm256_sign_epi8((__m256i)x, (__m256i)w.sign)));
#else
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) acc += ((x << (24 - 8 * byte)) >> 24) * ((w.values << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

// Four bytes in every lane.
INLINE vi four(const int8_t* bytes) {
    int32_t lane;
    std::memcpy(&lane, bytes, sizeof lane);
    return splat(lane);
}

// Four bytes each of W outputs.
INLINE vi load_line(const int8_t* from) {
    vi v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// `TOGETHER` lines of 64 bytes in tiles of int8 (`tiles.h`), W outputs of them, and `dot_biased`: acc plus their products
// with x, four bytes for each line, stored plus `BIAS`; plus what x = 0 gives with these weights, which is not 0.
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int TOGETHER = 2;

// Narrow weights (`quantise_narrow_int8` in `kernels/quantised.py`) as they are: four of them times bytes up to 255 fit in
// 16 bits.
template <bool NARROW>
struct Biased {
    static constexpr int32_t BIAS = 128;

    vi values[TOGETHER];

    INLINE explicit Biased(const int8_t* lines) {
#pragma GCC unroll 2
        for (int i = 0; i < TOGETHER; i++) values[i] = opaque(load_line(lines + i * 64));
    }

    INLINE vi pairs_with(int i, vi x) const { return pairs(x, values[i]); }
};

// Others lend their signs to the activations. The complement of a byte is one less than its negative, and can be had in
// more of the processor's ports. It is up to 128 in size: times weights whose sizes are 256 together (`reach_of`), it
// just fits.
template <>
struct Biased<false> {
    static constexpr int32_t BIAS = 0;

    vi sizes[TOGETHER], flips[TOGETHER];

    INLINE explicit Biased(const int8_t* lines) {
#pragma GCC unroll 2
        for (int i = 0; i < TOGETHER; i++) {
            const vi w = load_line(lines + i * 64);
#if defined(__AVX512F__)
            sizes[i] = (vi)_mm512_abs_epi8((__m512i)w);
            flips[i] = (vi)_mm512_movm_epi8(_mm512_movepi8_mask((__m512i)w));
#else
            sizes[i] = (vi)_mm256_abs_epi8((__m256i)w);
            flips[i] = (vi)_mm256_cmpgt_epi8(_mm256_setzero_si256(), (__m256i)w);
#endif
        }
    }

    INLINE vi pairs_with(int i, vi x) const { return pairs(sizes[i], x ^ flips[i]); }
};

template <bool NARROW>
INLINE vi dot_biased(vi acc, const int8_t* x, const Biased<NARROW>& w) {
    // Else GCC adds up the products of a group first, for which registers do not suffice.
    return opaque(acc + fold_pairs(add_pairs(w.pairs_with(0, four(x)), w.pairs_with(1, four(x + 4)))));
}
#else
constexpr int TOGETHER = 1;

template <bool NARROW>
struct Biased {
#if defined(__AVXVNNI__)
    static constexpr int32_t BIAS = 128;
#else
    static constexpr int32_t BIAS = OFFSET;
#endif

    Fours weights;

    INLINE explicit Biased(const int8_t* line) : weights(load_line(line)) {}
};

template <bool NARROW>
INLINE vi dot_biased(vi acc, const int8_t* x, const Biased<NARROW>& w) {
#if defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)four(x), (__m256i)w.weights.sign);
#else
    return dot4(acc, four(x), w.weights);
#endif
}
#endif

INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

using vb = int8_t __attribute__((vector_size(W)));

// The low byte of each.
INLINE void store_bytes(vi integers, int8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // GCC would take them one by one.
    const __m256i low = _mm256_set1_epi32(0x0c080400);
    const __m256i picked = _mm256_shuffle_epi8((__m256i)integers, low);  // four of each half
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
    std::memcpy(to, &both, W);
#else
    const vb narrow = __builtin_convertvector(integers, vb);
    std::memcpy(to, &narrow, sizeof narrow);
#endif
}

// x to the nearest integer, halves to even; below 2^22 in size.
INLINE vi rounded(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    // Not fused with the product that x is: that would round once instead of twice, and not as the reference does.
    x = opaque(x);
    const vf magic = splat(12582912.0f);
    return bits(x + magic) - bits(magic);
#endif
}
