// What the linears of all weight formats share.
#pragma once

#include <algorithm>

#include "simd.h"

struct Linear {
    long rows, in, out;
    const float* bias;      // or null
    const float* residual;  // [rows][out], or null
    float* y;               // [rows][out]
    bool swiglu;            // the weight is [2 * out][in]: gates, then ups
};

constexpr long PANEL_BYTES = 1 << 20;
// Packed rows of so many bytes at most are computed with at a time, to stay in the second-level cache.

// What becomes of W outputs of one row from n on; `up` is what the weight's second half gave, with `op.swiglu`.
INLINE vf finished(const Linear& op, long row, long n, vf value, vf up) {
    if (op.bias) value += load(op.bias + n);
    if (op.swiglu) {
        if (op.bias) up += load(op.bias + op.out + n);
        value = silu(value) * up;
    }
    return op.residual ? load(op.residual + row * op.out + n) + value : value;
}

// The same for the last outputs, fewer than W.
INLINE void finish_rest(const Linear& op, long row, long n, int count, vf value, vf up) {
    float values[W], ups[W];
    for (int i = 0; i < W; i++) {
        const bool biased = op.bias && i < count;
        values[i] = value[i] + (biased ? op.bias[n + i] : 0.0f);
        ups[i] = up[i] + (biased && op.swiglu ? op.bias[op.out + n + i] : 0.0f);
    }
    if (op.swiglu) store(values, silu(load(values)) * load(ups));
    for (int i = 0; i < count; i++) {
        const long at = row * op.out + n + i;
        op.y[at] = op.residual ? op.residual[at] + values[i] : values[i];
    }
}
