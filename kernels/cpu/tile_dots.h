// A group's sums of weights times the bytes of R rows, on each instruction set.
#pragma once

#include "activations.h"

constexpr int FOURS = GROUP / 4;
// Lanes of 32 bits hold four bytes.

struct Weights {
    vi fours[FOURS];  // inputs 4 i to 4 i + 3 of W outputs
};

using Bytes = int8_t[GROUP];
// A group of one row's activations, from -127 to 127.

#if defined(__AVX512VNNI__)
#define HAS_VNNI
// acc + the four products in each lane, of weights from 0 to 255.
INLINE vi add_fours(vi acc, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
#elif defined(__AVXVNNI__)
#define HAS_VNNI
INLINE vi add_fours(vi acc, vi w, vi x) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x); }
#endif

// Without VNNI: total[r] += weights from 0 to 15 times activations.
template <int R>
INLINE void add_unsigned(const Weights& w, const Bytes* rows, vi (&total)[R]) {
#if defined(__AVX2__)
    // Pairs are at most 2 * 15 * 127, so eight of them fit in 16 bits. Half of the weights at a time, else registers do not
    // suffice for them and the sums.
    vi sum[R];
#pragma GCC unroll 2
    for (int half = 0; half < FOURS; half += FOURS / 2) {
        vi some[FOURS / 2];
#pragma GCC unroll 4
        for (int i = 0; i < FOURS / 2; i++) some[i] = opaque(w.fours[half + i]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const int8_t* x = rows[r] + 4 * half;
            vi products[FOURS / 2];
#pragma GCC unroll 4
            for (int i = 0; i < FOURS / 2; i++) products[i] = pairs(some[i], four(x + 4 * i));
            const vi found = add_pairs(add_pairs(products[0], products[1]), add_pairs(products[2], products[3]));
            sum[r] = opaque(half == 0 ? found : add_pairs(sum[r], found));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] += fold_pairs(sum[r]);
#else
    for (int i = 0; i < FOURS; i++)
        for (int r = 0; r < R; r++) total[r] = dot4(total[r], four(rows[r] + 4 * i), Fours(w.fours[i]));
#endif
}

// The same with weights from -127 to 127.
template <int R>
INLINE void add_signed(const Weights& w, const Bytes* rows, vi (&total)[R]) {
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++) {
        const Fours weights(w.fours[i]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) total[r] = dot4(total[r], four(rows[r] + 4 * i), weights);
    }
}
