// The small ops of a layer, each in one pass over memory.
#include <algorithm>

#include "export.h"
#include "panel.h"
#include "parallel.h"

namespace {

constexpr long SMALL = 16384;
// Below so many floats waking the other threads takes longer than the work.

INLINE int threads_for(long floats, int threads) { return floats < SMALL ? 1 : threads; }

// x [dim] turned in place, first half paired with second; cos, sin [dim / 2].
INLINE void rotate(float* x, const float* cos, const float* sin, long half) {
    for (long i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[i] + first * sin[i];
    }
}

}  // namespace

// y [rows, size] = x over its root mean square, times weight [size].
EXPORT void eft_rms_norm(const float* x, long stride, long rows, long size, const float* weight, float eps, float* y,
                         int threads) {
    for_each(threads_for(rows * size, threads), rows, [&](long row) {
        const float* from = x + row * stride;
        float* to = y + row * size;
        const float scale = inverse_rms(from, size, eps);
        for (long i = 0; i < size; i++) to[i] = from[i] * scale * weight[i];
    });
}

// x [rows, 2 * inner], gate then up, to y [rows, inner].
EXPORT void eft_silu_mul(const float* x, long rows, long inner, float* y, int threads) {
    for_each(threads_for(rows * inner, threads), rows, [&](long row) {
        const float *gate = x + row * 2 * inner, *up = gate + inner;
        float* to = y + row * inner;
        long i = 0;
        for (; i + W <= inner; i += W) store(to + i, silu(load(gate + i)) * load(up + i));
        for (; i < inner; i++) to[i] = silu(splat(gate[i]))[0] * up[i];
    });
}

// Turns q [tokens, heads, dim] and k [tokens, kv_heads, dim] in place by cos, sin [tokens, dim / 2], and writes k
// and v into the caches at slots [tokens]. Strides are floats from one token to the next.
EXPORT void eft_rope_and_cache(float* q, long q_stride, float* k, long k_stride, const float* v, long v_stride,
                               const float* cos, const float* sin, float* keys, float* values, const int64_t* slots,
                               long tokens, long heads, long kv_heads, long dim, int threads) {
    const long half = dim / 2, wide = kv_heads * dim;
    for_each(threads_for(tokens * (heads + 2 * kv_heads) * dim, threads), tokens, [&](long token) {
        const float *c = cos + token * half, *s = sin + token * half;
        for (long head = 0; head < heads; head++) rotate(q + token * q_stride + head * dim, c, s, half);
        for (long head = 0; head < kv_heads; head++) rotate(k + token * k_stride + head * dim, c, s, half);
        std::copy_n(k + token * k_stride, wide, keys + slots[token] * wide);
        std::copy_n(v + token * v_stride, wide, values + slots[token] * wide);
    });
}

// The index of each row's largest of `size` logits (the first one of equals), and its value; of a NaN, if there is one.
EXPORT void eft_argmax(const float* logits, long rows, long size, int64_t* index, float* value, int threads) {
    for_each(threads_for(rows * size, threads), rows, [&](long row) {
        const float* line = logits + row * size;
        vf most = splat(line[0]);
        vf broken = {};
        long i = 0;
        for (; i + W <= size; i += W) {
            const vf v = load(line + i);
            most = max(v, most);
            broken += v - v;  // not 0 where v is NaN or infinite
        }
        float best = line[0];
        for (int lane = 0; lane < W; lane++) best = std::max(best, most[lane]);
        for (; i < size; i++) best = std::max(best, line[i]);
        long at = 0;
        while (at < size && line[at] != best) at++;
        if (sum(broken) != 0.0f || at == size)
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
