// A row's tokens by their weight, exp((logit - largest) / temperature): the largest weighs 1.
//
// One thread does a whole row, and sums are in float64 in one order, so a row's token depends on nothing but the row:
// tokens in runs of 32, of a run its 16 lanes (the tokens j and j + 16), the lanes in halves, the runs one by one.
#pragma once

#include <algorithm>
#include <cmath>

#include "scratch.h"
#include "simd.h"

// Tokens whose weights are summed together.
constexpr int RUN_TOKENS = 32;

// The largest of `size` logits, or NaN where one of them is.
inline float largest_logit(const float* logits, long size) {
    vf most = splat(-INFINITY);
    vi has_nan = {};
    long i = 0;
    for (; i + W <= size; i += W) {
        const vf v = load(logits + i);
        most = max(v, most);
        has_nan |= v != v;
    }
    float best = -INFINITY;
    bool nan = false;
    for (int lane = 0; lane < W; lane++) {
        best = std::max(best, most[lane]);
        nan |= has_nan[lane] != 0;
    }
    for (; i < size; i++) {
        best = std::max(best, logits[i]);
        nan |= logits[i] != logits[i];
    }
    return nan ? NAN : best;
}

class TokenWeights {
   public:
    // `most`: the largest of the row's logits, finite.
    TokenWeights(const float* logits, long size, float most, float temperature, Scratch& scratch)
        : size(size), runs((size + RUN_TOKENS - 1) / RUN_TOKENS) {
        const size_t count = static_cast<size_t>(runs);
        sums_ = reinterpret_cast<double*>(scratch.bytes(count * (sizeof(double) + (RUN_TOKENS + 1) * sizeof(float))));
        weights_ = reinterpret_cast<float*>(sums_ + runs);
        run_maxima_ = weights_ + runs * RUN_TOKENS;
        // Times the inverse, which must be finite: of the largest it would else make a NaN.
        const vf top = splat(most), inverse = splat(std::min(1.0f / temperature, 3.4e38f));
        for (long run = 0; run < runs; run++) {
            const float* from = logits + run * RUN_TOKENS;
            float rest[RUN_TOKENS];
            if (run * RUN_TOKENS + RUN_TOKENS > size) {
                std::fill_n(rest, RUN_TOKENS, -INFINITY);
                std::copy(from, logits + size, rest);
                from = rest;
            }
            fill(from, top, inverse, run);
        }
        for (long run = 0; run < runs; run++) total += sums_[run];
    }

    float operator[](long token) const { return weights_[token]; }

    // The largest weight of a run.
    float top(long run) const { return run_maxima_[run]; }

    // A weight that at least `count` tokens reach, as high as is easily found; 0 where that is none.
    float threshold_of(long count) const {
        if (count > runs) return 0.0f;
        static thread_local Scratch scratch;
        float* copy = scratch.floats(static_cast<size_t>(runs));
        std::copy_n(run_maxima_, runs, copy);
        std::nth_element(copy, copy + count - 1, copy + runs, [](float a, float b) { return a > b; });
        return copy[count - 1];
    }

    // In the order of ids the token at which the sum of weights passes `point`, or else the last that has any weight.
    long at(double point) const {
        double before = 0.0;
        long last = 0;
        for (long run = 0; run < runs; run++) {
            if (sums_[run] > 0.0) last = run;
            if (before + sums_[run] > point) break;
            before += sums_[run];
        }
        long found = 0;
        for (long token = last * RUN_TOKENS; token < last * RUN_TOKENS + RUN_TOKENS; token++) {
            if (weights_[token] > 0.0f) found = token;
            if ((before += weights_[token]) > point) break;
        }
        return found;
    }

    const long size, runs;
    double total = 0.0;

   private:
    void fill(const float* logits, vf top, vf inverse, long run) {
        float* to = weights_ + run * RUN_TOKENS;
        vf most = {};
#pragma GCC unroll 8
        for (int i = 0; i < RUN_TOKENS; i += W) {
            const vf weight = exp((load(logits + i) - top) * inverse);
            most = max(weight, most);
            store(to + i, weight);
        }
        float tops[W];
        store(tops, most);
        for (int step = W / 2; step > 0; step /= 2)
            for (int i = 0; i < step; i++) tops[i] = std::max(tops[i], tops[i + step]);
        run_maxima_[run] = tops[0];
        double lanes[RUN_TOKENS / 2];
        for (int i = 0; i < RUN_TOKENS / 2; i++)
            lanes[i] = static_cast<double>(to[i]) + static_cast<double>(to[i + RUN_TOKENS / 2]);
        for (int step = RUN_TOKENS / 4; step > 0; step /= 2)
            for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
        sums_[run] = lanes[0];
    }

    float* weights_;  // [runs][RUN_TOKENS], 0 beyond the last token
    double* sums_;    // [runs]
    float* run_maxima_;  // [runs]
};
