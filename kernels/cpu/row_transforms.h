// 64 numbers times a Hadamard matrix: sums and differences of pairs, from the farthest to the nearest. Each is rounded
// once, so all instruction sets agree. See `kernels/hadamard.py`.
#pragma once

#include "simd.h"

constexpr int TURNED = 64;
// Numbers of a block.
constexpr int TURNED_VECTORS = TURNED / W;
constexpr float TURNED_SCALE = 0.125f;
// What makes the matrix its own inverse; left to the caller.

// The elements of v in pairs D apart, each in the other's place.
template <int D>
INLINE vf swapped(vf v) {
#if defined(__clang__)
#if defined(__AVX512F__)
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D, 8 ^ D, 9 ^ D, 10 ^ D,
                                   11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
#elif defined(__AVX__)
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D);
#else
    return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D);
#endif
#else
    vi order;
    for (int i = 0; i < W; i++) order[i] = i ^ D;
    return __builtin_shuffle(v, order);
#endif
}

// Sums in the first of pairs D apart, differences in the second.
template <int D>
INLINE vf butterfly(vf v) {
    vf signs;
    for (int i = 0; i < W; i++) signs[i] = i & D ? -1.0f : 1.0f;
    return fused(v, signs, swapped<D>(v));  // a product with 1 or -1 is exact
}

template <int D>
INLINE void turn_within(vf (&v)[TURNED_VECTORS]) {
    if constexpr (D > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < TURNED_VECTORS; i++) v[i] = butterfly<D>(v[i]);
        turn_within<D / 2>(v);
    }
}

// Elements j to j + W - 1 of a block in v[j / W].
INLINE void turn(vf (&v)[TURNED_VECTORS]) {
#pragma GCC unroll 4
    for (int apart = TURNED_VECTORS / 2; apart > 0; apart /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < TURNED_VECTORS; i++)
            if ((i & apart) == 0) {
                const vf first = v[i], second = v[i + apart];
                v[i] = first + second;
                v[i + apart] = first - second;
            }
    turn_within<W / 2>(v);
}
