// Products of signed bytes, four at a time in each 32-bit lane, summed exactly.
//
// VNNI multiplies unsigned with signed bytes, so activations are stored plus 128 there, and 128 times the sum of the
// weights is taken off again at the end.
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

// acc + the four products in each lane: x as stored, w a group of four weights in every lane.
INLINE vi dot4(vi acc, vi x, vi w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // No saturation: with 128 and 127 at most, a pair of products is at most 32,512.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)w, (__m256i)x));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) acc += ((x << (24 - 8 * byte)) >> 24) * ((w << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

using vb = int8_t __attribute__((vector_size(W)));

// x to the nearest integer, halves to even; below 2^22 in size.
INLINE vi rounded(vf x) {
    // Not fused with the product that x is: that would round once instead of twice, and not as the reference does.
    x = opaque(x);
    const vf magic = splat(12582912.0f);
    return bits(x + magic) - bits(magic);
}
