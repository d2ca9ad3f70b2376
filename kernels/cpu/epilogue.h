// The size of a linear and what follows its product (bias, SwiGLU, residual), for all weight formats.
#pragma once

#include <algorithm>

#include "simd.h"

struct GemmProblem {
    long rows, in, out;
    const float* bias;      // or null
    const float* residual;  // [rows][out], or null
    float* y;               // [rows][out]
    bool swiglu;            // the weight is [2 * out][in]: gates, then ups
};

// Bytes of packed rows that are multiplied at a time, at most: they stay in the second-level cache.
constexpr long MAX_PACKED_BYTES = 1 << 20;

// The results for W outputs of one row from n on; with `op.swiglu` `up` is the product of the weight's second half.
INLINE vf apply_epilogue(const GemmProblem& op, long row, long n, vf value, vf up) {
    if (op.bias) value += load(op.bias + n);
    if (op.swiglu) {
        if (op.bias) up += load(op.bias + op.out + n);
        value = silu(value) * up;
    }
    return op.residual ? load(op.residual + row * op.out + n) + value : value;
}

// The same for the last outputs, fewer than W.
INLINE void store_tail(const GemmProblem& op, long row, long n, int count, vf value, vf up) {
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
