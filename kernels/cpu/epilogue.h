// The size of a linear and what follows its product (bias, SwiGLU, residual), for all weight formats.
#pragma once

#include <algorithm>

#include "lora_rows.h"
#include "simd.h"

struct GemmProblem {
    long rows, in, out;
    const float* bias;              // or null
    const float* residual;          // [rows][out], or null
    float* y;                       // [rows][out]
    bool swiglu;                    // the weight is [2 * out][in]: gates, then ups
    LoraDeltas* lora;               // or null: no adapters
    const float* const* lora_rows;  // `LoraDeltas::rows`

    // The rows from `first` on, `count` of them.
    GemmProblem part(long first, long count) const {
        GemmProblem some = *this;
        some.rows = count;
        some.y += first * out;
        if (residual) some.residual += first * out;
        if (lora_rows) some.lora_rows += first;
        return some;
    }

    // For every thread before its products: what is to be done about adapters before rows are packed, and after.
    void begin_lora() const {
        if (lora) lora->shrink();
    }
    void finish_lora() const {
        if (!lora) return;
        lora->expand();
        lora->wait();
    }

    // What adapters add to the outputs of a row from n on; null: nothing.
    INLINE const float* delta(long row, long n) const {
        return lora_rows && lora_rows[row] ? lora_rows[row] + n : nullptr;
    }
};

// Bytes of packed rows that are multiplied at a time, at most: they stay in the second-level cache.
constexpr long MAX_PACKED_BYTES = 1 << 20;

// The results for W outputs of one row from n on; with `op.swiglu` `up` is the product of the weight's second half.
INLINE vf apply_epilogue(const GemmProblem& op, long row, long n, vf value, vf up) {
    const float* delta = op.delta(row, n);
    if (op.bias) value += load(op.bias + n);
    if (op.swiglu) {
        if (op.bias) up += load(op.bias + op.out + n);
        if (delta) {
            value += load(delta);
            up += load(delta + op.out);
        }
        value = silu(value) * up;
        return op.residual ? load(op.residual + row * op.out + n) + value : value;
    }
    if (op.residual) value = load(op.residual + row * op.out + n) + value;
    return delta ? value + load(delta) : value;
}

// The same for the last outputs, fewer than W.
INLINE void store_tail(const GemmProblem& op, long row, long n, int count, vf value, vf up) {
    const float* delta = op.delta(row, n);
    const bool adapted = delta && !op.swiglu;
    float values[W], ups[W];
    for (int i = 0; i < W; i++) {
        const bool biased = op.bias && i < count, within = op.swiglu && delta && i < count;
        values[i] = value[i] + (biased ? op.bias[n + i] : 0.0f);
        ups[i] = up[i] + (biased && op.swiglu ? op.bias[op.out + n + i] : 0.0f);
        if (!within) continue;
        values[i] += delta[i];
        ups[i] += delta[op.out + i];
    }
    if (op.swiglu) store(values, silu(load(values)) * load(ups));
    for (int i = 0; i < count; i++) {
        const long at = row * op.out + n + i;
        op.y[at] = op.residual ? op.residual[at] + values[i] : values[i];
        if (adapted) op.y[at] += delta[i];
    }
}
