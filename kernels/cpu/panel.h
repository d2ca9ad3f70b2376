// Rows of activations, turned so that one vector holds the same feature of W rows.
//
// A panel holds MV * W rows as [in][MV * W]. Every product below multiplies such a vector by one weight that
// is broadcast, so each output is one sum in the order of its features, whatever else is in the batch:
// a row's result does not depend on how many rows there are, nor on which thread computes it.
#pragma once

#include <cmath>

#include "simd.h"

#if defined(__AVX512F__)
constexpr int MOST_VECTORS = 2;
#else
constexpr int MOST_VECTORS = 4;
#endif
constexpr int LANES = MOST_VECTORS * W;
// Rows in a full panel.

// Vectors in the panel that begins at row `first` of `rows`: as few as hold the rest.
INLINE int panel_vectors(long first, long rows) {
    const long left = rows - first;
    int vectors = MOST_VECTORS;
    while (vectors > 1 && left <= vectors / 2 * W) vectors /= 2;
    return vectors;
}

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

// Turns rows x [count <= W][in], `stride` floats apart, into one vector column of a panel: out[k * lanes + row].
// With `norm` [in] each row is normalised by its root mean square first. Rows beyond `count` become zero.
inline void pack_rows(const float* x, long stride, int count, long in, const float* norm, float eps, float* out,
                      int lanes) {
    float scale[W];
    for (int row = 0; row < W; row++)
        scale[row] = norm && row < count ? inverse_rms(x + row * stride, in, eps) : 1.0f;
    long k = 0;
    for (; k + W <= in; k += W) {
        vf rows[W];
        for (int row = 0; row < W; row++) rows[row] = row < count ? load(x + row * stride + k) : vf{};
        if (norm) {
            const vf weight = load(norm + k);
            for (int row = 0; row < W; row++) rows[row] = rows[row] * splat(scale[row]) * weight;
        }
        transpose(rows);
        for (int i = 0; i < W; i++) store(out + (k + i) * lanes, rows[i]);
    }
    for (; k < in; k++)
        for (int row = 0; row < W; row++)
            out[k * lanes + row] = row < count ? x[row * stride + k] * scale[row] * (norm ? norm[k] : 1.0f) : 0.0f;
}
