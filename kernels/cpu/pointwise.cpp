// The small ops of a layer, each in one pass over memory.
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "bfloat16.h"
#include "exports.h"
#include "int8_dot.h"
#include "row_transforms.h"
#include "threading.h"

namespace {

// Floats below which waking the other threads takes longer than the work.
constexpr long MIN_PARALLEL_FLOATS = 16384;

INLINE int threads_for(long floats, int threads) { return floats < MIN_PARALLEL_FLOATS ? 1 : threads; }

// Calls body(row) for every row of `size` floats; a task has enough of them to be worth its claim.
template <typename Body>
void for_rows(int threads, long rows, long size, Body&& body) {
    const long share = std::max(1L, MIN_PARALLEL_FLOATS / 4 / std::max(size, 1L));
    parallel_for(threads_for(rows * size, threads), (rows + share - 1) / share, [&](long task) {
        const long end = std::min(rows, (task + 1) * share);
        for (long row = task * share; row < end; row++) body(row);
    });
}

// The sum of f(x) over x [count].
template <typename F>
INLINE float total(const float* x, long count, F&& f) {
    vf sums = {};
    long i = 0;
    for (; i + W <= count; i += W) sums += f(load(x + i));
    float result = sum(sums);
    for (; i < count; i++) result += f(x[i]);
    return result;
}

// y = f(gate) * up; x [rows, 2 * inner], gate then up, y [rows, inner].
template <typename F>
INLINE void gated(const float* x, long rows, long inner, float* y, int threads, F&& f) {
    for_rows(threads, rows, inner, [&](long row) {
        const float *gate = x + row * 2 * inner, *up = gate + inner;
        float* to = y + row * inner;
        long i = 0;
        for (; i + W <= inner; i += W) store(to + i, f(load(gate + i)) * load(up + i));
        for (; i < inner; i++) to[i] = f(splat(gate[i]))[0] * up[i];
    });
}

// y = f(x), both [count].
template <typename F>
INLINE void map_floats(const float* x, long count, float* y, int threads, F&& f) {
    constexpr long TASK_FLOATS = MIN_PARALLEL_FLOATS / 4;
    parallel_for(threads_for(count, threads), (count + TASK_FLOATS - 1) / TASK_FLOATS, [&](long task) {
        const long end = std::min(count, (task + 1) * TASK_FLOATS);
        long i = task * TASK_FLOATS;
        for (; i + W <= end; i += W) store(y + i, f(load(x + i)));
        for (; i < end; i++) y[i] = f(splat(x[i]))[0];
    });
}

// y = the first 2 * half of x turned, first half paired with second; cos, sin [half], the latter times `sign`. y may be
// x.
INLINE void rotate(const float* x, const float* cos, const float* sin, long half, float* y, float sign = 1.0f) {
    long i = 0;
    for (; i + W <= half; i += W) {
        const vf first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i) * splat(sign);
        store(y + i, first * c - second * s);
        store(y + half + i, second * c + first * s);
    }
    for (; i < half; i++) {
        const float first = x[i], second = x[half + i], turn = sin[i] * sign;
        y[i] = first * cos[i] - second * turn;
        y[half + i] = second * cos[i] + first * turn;
    }
}

INLINE void rotate_in_place(float* x, const float* cos, const float* sin, long half) { rotate(x, cos, sin, half, x); }

void write_bfloat16(const float* from, long dim, char* to) {
    long d = 0;
    for (; d + W <= dim; d += W) store_bfloat16(load(from + d), to + 2 * d);
    for (; d < dim; d++) {
        const uint16_t half = to_bfloat16(from[d]);
        std::memcpy(to + 2 * d, &half, sizeof half);
    }
}

void write_int8(const float* from, long dim, char* to) {
    auto* bytes = reinterpret_cast<int8_t*>(to);
    vf mosts = {}, nonfinites = {};
    long d = 0;
    for (; d + W <= dim; d += W) {
        const vf v = load(from + d);
        mosts = max(mosts, bits(bits(v) & 0x7fffffff));
        nonfinites += v - v;
    }
    float most = maximum(mosts), nonfinite = sum(nonfinites);
    for (; d < dim; d++) {
        most = std::max(most, std::fabs(from[d]));
        nonfinite += from[d] - from[d];
    }
    // A head that is not finite has such a scale, and so is known for what it is.
    const float scale = most / 127.0f + nonfinite;
    const float factor = most > 0.0f && std::isfinite(scale) ? 127.0f / most : 0.0f;
    std::memcpy(to + dim, &scale, sizeof scale);
    if (factor == 0.0f) {
        std::memset(to, 0, static_cast<size_t>(dim));
        return;
    }
    for (d = 0; d + W <= dim; d += W) store_bytes(rounded(load(from + d) * splat(factor)), bytes + d);
    for (; d < dim; d++) bytes[d] = static_cast<int8_t>(std::nearbyint(from[d] * factor));
}

// Writes a token's head [dim] into the cache.
void write_head(const float* from, long dim, int type, char* to) {
    switch (type) {
        case FLOAT32: std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(float)); return;
        case BFLOAT16: return write_bfloat16(from, dim, to);
        case INT8: return write_int8(from, dim, to);
    }
}

}  // namespace

void eft_rms_norm(const float* x, long stride, long rows, long size, const float* weight, float one, float eps,
                         float* y, int threads) {
    for_rows(threads, rows, size,
             [&](long row) { normalise(x + row * stride, size, weight, one, eps, y + row * size); });
}

void eft_layer_norm(const float* x, long stride, long rows, long size, const float* weight, const float* bias,
                           float eps, float* y, int threads) {
    for_rows(threads, rows, size, [&](long row) {
        const float* from = x + row * stride;
        float* to = y + row * size;
        const float mean = total(from, size, [](auto v) INLINE_LAMBDA { return v; }) / static_cast<float>(size);
        const float squares = total(from, size, [&](auto v) INLINE_LAMBDA { return (v - mean) * (v - mean); });
        const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
        for (long i = 0; i < size; i++) to[i] = (from[i] - mean) * scale;
        if (weight)
            for (long i = 0; i < size; i++) to[i] *= weight[i];
        if (bias)
            for (long i = 0; i < size; i++) to[i] += bias[i];
    });
}

void eft_silu_mul(const float* x, long rows, long inner, float* y, int threads) {
    gated(x, rows, inner, y, threads, [](vf v) INLINE_LAMBDA { return silu(v); });
}

void eft_gelu_mul(const float* x, long rows, long inner, int tanh, float* y, int threads) {
    if (tanh)
        gated(x, rows, inner, y, threads, [](vf v) INLINE_LAMBDA { return gelu_tanh(v); });
    else
        gated(x, rows, inner, y, threads, [](vf v) INLINE_LAMBDA { return gelu(v); });
}

void eft_gelu(const float* x, long count, int tanh, float* y, int threads) {
    if (tanh)
        map_floats(x, count, y, threads, [](vf v) INLINE_LAMBDA { return gelu_tanh(v); });
    else
        map_floats(x, count, y, threads, [](vf v) INLINE_LAMBDA { return gelu(v); });
}

void eft_rope_and_cache(float* q, long q_stride, float* k, long k_stride, const float* v, long v_stride,
                               const float* cos, const float* sin, long half, char* keys, char* values,
                               const int64_t* slots, long tokens, long heads, long kv_heads, long dim, int type,
                               int threads) {
    const long wide = kv_heads * head_bytes(type, dim);
    parallel_for(threads_for(tokens * (heads + 2 * kv_heads) * dim, threads), tokens, [&](long token) {
        const float *c = cos + token * half, *s = sin + token * half;
        for (long head = 0; head < heads; head++) rotate_in_place(q + token * q_stride + head * dim, c, s, half);
        for (long head = 0; head < kv_heads; head++) rotate_in_place(k + token * k_stride + head * dim, c, s, half);
        for (long head = 0; head < kv_heads; head++) {
            const long at = slots[token] * wide + head * head_bytes(type, dim);
            write_head(k + token * k_stride + head * dim, dim, type, keys + at);
            write_head(v + token * v_stride + head * dim, dim, type, values + at);
        }
    });
}

void eft_rope(const float* x, long stride, long tokens, long heads, long dim, const float* cos, const float* sin,
              long half, int back, float* y, int threads) {
    for_rows(threads, tokens, heads * dim, [&](long token) {
        for (long head = 0; head < heads; head++) {
            const float* from = x + token * stride + head * dim;
            float* to = y + (token * heads + head) * dim;
            rotate(from, cos + token * half, sin + token * half, half, to, back ? -1.0f : 1.0f);
            std::copy(from + 2 * half, from + dim, to + 2 * half);
        }
    });
}

void eft_rms_norm_backward(const float* x, long stride, long rows, long size, const float* weight, float eps,
                           const float* grad, float* y, int threads) {
    for_rows(threads, rows, size, [&](long row) {
        const float *from = x + row * stride, *above = grad + row * size;
        float* to = y + row * size;
        const float inverse = inverse_rms(from, size, eps);
        vf products = {};
        long i = 0;
        for (; i + W <= size; i += W) products += load(above + i) * load(weight + i) * load(from + i);
        float product = sum(products);
        for (; i < size; i++) product += above[i] * weight[i] * from[i];
        const float share = product / static_cast<float>(size) * inverse * inverse;
        for (i = 0; i < size; i++) to[i] = (above[i] * weight[i] - from[i] * share) * inverse;
    });
}

void eft_silu_mul_backward(const float* x, long rows, long inner, const float* grad, float* y, int threads) {
    for_rows(threads, rows, 2 * inner, [&](long row) {
        const float *gates = x + row * 2 * inner, *ups = gates + inner, *above = grad + row * inner;
        float *to_gates = y + row * 2 * inner, *to_ups = to_gates + inner;
        const auto both = [](vf gate, vf up, vf from, vf& to_gate, vf& to_up) INLINE_LAMBDA {
            const vf one = splat(1.0f), sigmoid = one / (one + exp(-gate));
            to_up = from * gate * sigmoid;
            to_gate = from * up * sigmoid * (one + gate * (one - sigmoid));
        };
        vf to_gate, to_up;
        long i = 0;
        for (; i + W <= inner; i += W) {
            both(load(gates + i), load(ups + i), load(above + i), to_gate, to_up);
            store(to_gates + i, to_gate);
            store(to_ups + i, to_up);
        }
        for (; i < inner; i++) {
            both(splat(gates[i]), splat(ups[i]), splat(above[i]), to_gate, to_up);
            to_gates[i] = to_gate[0];
            to_ups[i] = to_up[0];
        }
    });
}

void eft_argmax(const float* logits, long rows, long size, int64_t* index, float* value, int threads) {
    parallel_for(threads_for(rows * size, threads), rows, [&](long row) {
        const float* line = logits + row * size;
        vf most = splat(line[0]);
        vf nonfinite = {};
        long i = 0;
        for (; i + W <= size; i += W) {
            const vf v = load(line + i);
            most = max(v, most);
            nonfinite += v - v;  // not 0 where v is NaN or infinite
        }
        float best = line[0];
        for (int lane = 0; lane < W; lane++) best = std::max(best, most[lane]);
        for (; i < size; i++) best = std::max(best, line[i]);
        long at = 0;
        while (at < size && line[at] != best) at++;
        if (sum(nonfinite) != 0.0f || at == size)
            for (long j = 0; j < size; j++)
                if (line[j] != line[j]) {
                    at = j;
                    best = line[j];
                    break;
                }
        index[row] = at;
        value[row] = best;
    });
}
