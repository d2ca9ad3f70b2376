// Transforms of a row of activations before it is multiplied: RMSNorm, and the Hadamard transform of its blocks.
#pragma once

#include <cmath>

#include "simd.h"

// One over the root mean square of x [in].
INLINE float inverse_rms(const float* x, long in, float eps) {
    vf squares[4] = {};
    long k = 0;
    for (; k + 4 * W <= in; k += 4 * W)
        for (int i = 0; i < 4; i++) {
            const vf v = load(x + k + i * W);
            squares[i] += v * v;
        }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; k < in; k++) total += x[k] * x[k];
    return 1.0f / std::sqrt(total / static_cast<float>(in) + eps);
}

// y [in] = x over its root mean square, times the norm's weight plus `one`, which is 0 or 1.
INLINE void normalise(const float* x, long in, const float* norm, float one, float eps, float* y) {
    const float scale = inverse_rms(x, in, eps);
    for (long k = 0; k < in; k++) y[k] = x[k] * scale * (norm[k] + one);
}

// Numbers of a block that are multiplied with a Hadamard matrix: sums and differences of pairs, from the farthest to
// the nearest. Each is rounded once, so all instruction sets agree. See `kernels/hadamard.py`.
constexpr int HADAMARD_SIZE = 64;
constexpr int HADAMARD_VECTORS = HADAMARD_SIZE / W;
// Factor that makes the matrix its own inverse, 1 / sqrt(HADAMARD_SIZE); `hadamard` leaves it to the caller.
constexpr float HADAMARD_SCALE = 0.125f;

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
    return fmadd(v, signs, swapped<D>(v));  // a product with 1 or -1 is exact
}

template <int D>
INLINE void hadamard_within(vf (&v)[HADAMARD_VECTORS]) {
    if constexpr (D > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < HADAMARD_VECTORS; i++) v[i] = butterfly<D>(v[i]);
        hadamard_within<D / 2>(v);
    }
}

// Elements j to j + W - 1 of a block in v[j / W].
INLINE void hadamard(vf (&v)[HADAMARD_VECTORS]) {
#pragma GCC unroll 4
    for (int apart = HADAMARD_VECTORS / 2; apart > 0; apart /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < HADAMARD_VECTORS; i++)
            if ((i & apart) == 0) {
                const vf first = v[i], second = v[i + apart];
                v[i] = first + second;
                v[i + apart] = first - second;
            }
    hadamard_within<W / 2>(v);
}
