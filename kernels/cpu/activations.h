// Rows of activations on their way to integers: normalised where a norm comes first, then two bytes each.
//
// One scale a row: value = integer * scale. In one byte the outliers of a row leave too little for the rest (SmolLM2's
// perplexity rises by 4%).
#pragma once

#include <algorithm>
#include <cmath>

#include "int8.h"
#include "panel.h"

constexpr float MOST = 127.0f * 256.0f;
// What a row's largest activation becomes.

struct Activations {
    const float* x;
    long stride;  // floats from one row to the next
    long in;
    const float* norm;  // or null
    float eps;

    // Calls take(integers, k) for every W features from k on, zero beyond the end, and returns the row's scale. A row
    // that is not finite has such a scale, and so have its outputs, whatever the integers are.
    template <typename Take>
    INLINE float quantise(long row, Take&& take) const {
        const float* from = x + row * stride;
        const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
        const float most = largest(from, inverse);
        const float factor = most > 0.0f && most < INFINITY ? MOST / most : 0.0f;
        for (long k = 0; k < in; k += W)
            take(factor > 0.0f ? rounded(values(from, k, inverse) * splat(factor)) : vi{}, k);
        return most / MOST;
    }

   private:
    // W of a row's values from feature k on, normalised; zero beyond its end.
    INLINE vf values(const float* from, long k, float inverse) const {
        if (k + W <= in) return norm ? load(from + k) * splat(inverse) * load(norm + k) : load(from + k);
        float rest[W] = {};
        for (long i = k; i < in; i++) rest[i - k] = norm ? from[i] * inverse * norm[i] : from[i];
        return load(rest);
    }

    // The largest size of a row's values; not finite if one of them is not.
    INLINE float largest(const float* from, float inverse) const {
        vf most = {}, broken = {};
        for (long k = 0; k < in; k += W) {
            const vf v = values(from, k, inverse);
            most = max(most, max(v, -v));
            broken += v - v;
        }
        float size = 0.0f;
        for (int i = 0; i < W; i++) size = std::max(size, most[i]);
        return size + sum(broken);
    }
};
