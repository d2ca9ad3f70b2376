// Rows of activations on their way to bytes: normalised where a norm comes first, then integers with a scale.
//
// value = integer * scale. One scale for a row as it is would not do, since outliers leave too little of a byte for the
// rest: either each group of 32 has its own, or the row is turned first (`hadamard.h`).
#pragma once

#include <algorithm>
#include <cmath>

#include "hadamard.h"
#include "int8.h"
#include "norm.h"
#include "scratch.h"

constexpr float MOST = 127.0f;
// What the largest activation of those with one scale becomes.
constexpr int GROUP = 32;

struct Activations {
    const float* x;
    long stride;  // floats from one row to the next
    long in;
    const float* norm;  // or null
    float eps;

    // Calls take(integers, k) for every W turned features from k on, up to a whole number of blocks, and returns the
    // row's scale. A row that is not finite has such a scale, and so have its outputs, whatever the integers are.
    template <typename Take>
    INLINE float quantise_turned(long row, Take&& take) const {
        static thread_local Scratch scratch;
        const long size = (in + TURNED - 1) / TURNED * TURNED;
        float* turned = scratch.floats(static_cast<size_t>(size));
        const float* from = x + row * stride;
        const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
        Largest largest;
        for (long block = 0; block < size; block += TURNED) {
            vf v[TURNED_VECTORS];
#pragma GCC unroll 16
            for (int i = 0; i < TURNED_VECTORS; i++) v[i] = values(from, block + i * W, inverse);
            turn(v);
#pragma GCC unroll 16
            for (int i = 0; i < TURNED_VECTORS; i++) {
                largest.add(v[i]);
                store(turned + block + i * W, v[i]);
            }
        }
        const float most = largest.value() * TURNED_SCALE, factor = factor_of(most) * TURNED_SCALE;
        for (long k = 0; k < size; k += W) take(integers(load(turned + k), factor), k);
        return most / MOST;
    }

    // Calls take(integers, group, at, scale) for every W features from `at` on of every group of 32, zero beyond the
    // row's end. What is not finite makes its group's scale so.
    template <typename Take>
    INLINE void quantise_groups(long row, Take&& take) const {
        const float* from = x + row * stride;
        const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
        for (long k = 0; k < in; k += GROUP) {
            vf v[GROUP / W];
            Largest largest;
#pragma GCC unroll 8
            for (int i = 0; i < GROUP / W; i++) {
                v[i] = values(from, k + i * W, inverse);
                largest.add(v[i]);
            }
            const float most = largest.value(), factor = factor_of(most);
#pragma GCC unroll 8
            for (int i = 0; i < GROUP / W; i++) take(integers(v[i], factor), k / GROUP, i * W, most / MOST);
        }
    }

   private:
    // The largest size of some values; not finite if one of them is not.
    struct Largest {
        vf most = {}, broken = {};

        INLINE void add(vf v) {
            most = max(most, max(v, -v));
            broken += v - v;
        }

        INLINE float value() const { return maximum(most) + sum(broken); }
    };

    static INLINE float factor_of(float most) { return most > 0.0f && most < INFINITY ? MOST / most : 0.0f; }

    static INLINE vi integers(vf v, float factor) { return factor > 0.0f ? rounded(v * splat(factor)) : vi{}; }

    // W of a row's values from feature k on, normalised; zero beyond its end.
    INLINE vf values(const float* from, long k, float inverse) const {
        if (k + W <= in) return norm ? load(from + k) * splat(inverse) * load(norm + k) : load(from + k);
        float rest[W] = {};
        for (long i = k; i < in; i++) rest[i - k] = norm ? from[i] * inverse * norm[i] : from[i];
        return load(rest);
    }
};
