// The norm of a row of activations.
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
