// A group's sums of weights times the bytes of R rows, on each instruction set.
#pragma once

#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int GROUP = 32;
constexpr int FOURS = GROUP / 4;
// Lanes of 32 bits hold four bytes.

struct Weights {
    vi fours[FOURS];  // inputs 4 i to 4 i + 3 of W outputs
};

// A group of one row's activations: the higher bytes, from -127, and the lower, from -128, both up to 127.
struct Bytes {
    int8_t high[GROUP];
    int8_t low[GROUP];
};

using Part = int8_t (Bytes::*)[GROUP];

INLINE vi four(const int8_t* bytes) {
    int32_t lane;
    std::memcpy(&lane, bytes, sizeof lane);
    return splat(lane);
}

#if defined(__AVX512F__)
INLINE vi pairs(vi w, vi x) { return (vi)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)a, (__m512i)b); }
INLINE vi fold_pairs(vi a) { return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
INLINE vi size_of_bytes(vi a) { return (vi)_mm512_abs_epi8((__m512i)a); }
INLINE vi with_sign_of(vi a, vi sign) {
    const __m512i v = (__m512i)a;
    return (vi)_mm512_mask_sub_epi8(v, _mm512_movepi8_mask((__m512i)sign), _mm512_setzero_si512(), v);
}
#elif defined(__AVX2__)
INLINE vi pairs(vi w, vi x) { return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
INLINE vi fold_pairs(vi a) { return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
INLINE vi size_of_bytes(vi a) { return (vi)_mm256_abs_epi8((__m256i)a); }
INLINE vi with_sign_of(vi a, vi sign) { return (vi)_mm256_sign_epi8((__m256i)a, (__m256i)sign); }
#endif

// total[r] += weights from 0 to 15 times one byte of each activation.
template <int R, Part PART>
INLINE void add_nibbles(const Weights& w, const Bytes* rows, vi (&total)[R]) {
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            total[r] = (vi)_mm512_dpbusd_epi32((__m512i)total[r], (__m512i)w.fours[i],
                                               (__m512i)four(rows[r].*PART + 4 * i));
#elif defined(__AVX2__)
    // Pairs are at most 2 * 15 * 128, so eight of them fit in 16 bits.
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        vi sum = pairs(w.fours[0], four(rows[r].*PART));
#pragma GCC unroll 8
        for (int i = 1; i < FOURS; i++) sum = add_pairs(sum, pairs(w.fours[i], four(rows[r].*PART + 4 * i)));
        total[r] += fold_pairs(sum);
    }
#else
    for (int i = 0; i < FOURS; i++)
        for (int r = 0; r < R; r++) total[r] = dot4(total[r], four(rows[r].*PART + 4 * i), w.fours[i]);
#endif
}

// total[r] += weights from -127 to 127 times one byte of each activation; with VNNI they come plus 128, and the caller
// takes 128 times the activations' sum off again.
template <int R, Part PART>
INLINE void add_bytes(const Weights& w, const Bytes* rows, vi (&total)[R]) {
#if defined(__AVX512VNNI__)
    add_nibbles<R, PART>(w, rows, total);
#else
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vi x = four(rows[r].*PART + 4 * i);
#if defined(__AVX2__)
            // A pair is at most 2 * 128 * 127: no saturation.
            total[r] += fold_pairs(pairs(size_of_bytes(x), with_sign_of(w.fours[i], x)));
#else
            total[r] = dot4(total[r], x, w.fours[i]);
#endif
        }
#endif
}
