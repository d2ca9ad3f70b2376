// The small ops of a layer, each in one pass over memory.
#include <algorithm>
#include <cmath>

#include "attention.h"
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

// Writes a token's head [dim] into the cache.
void write_head(const float* from, long dim, int type, char* to) {
    if (type == FLOAT32) {
        std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(float));
    } else if (type == BFLOAT16) {
        for (long d = 0; d < dim; d++) {
            const uint16_t half = to_bfloat16(from[d]);
            std::memcpy(to + 2 * d, &half, sizeof half);
        }
    } else {
        float most = 0.0f, broken = 0.0f;
        for (long d = 0; d < dim; d++) {
            most = std::max(most, std::fabs(from[d]));
            broken += from[d] - from[d];
        }
        // A head that is not finite has such a scale, and so is known for what it is.
        const float scale = most / 127.0f + broken;
        const float factor = most > 0.0f && std::isfinite(scale) ? 127.0f / most : 0.0f;
        for (long d = 0; d < dim; d++)
            to[d] = static_cast<char>(factor > 0.0f ? static_cast<int8_t>(std::nearbyint(from[d] * factor)) : 0);
        std::memcpy(to + dim, &scale, sizeof scale);
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
                               const float* cos, const float* sin, char* keys, char* values, const int64_t* slots,
                               long tokens, long heads, long kv_heads, long dim, int type, int threads) {
    const long half = dim / 2, wide = kv_heads * head_bytes(type, dim);
    for_each(threads_for(tokens * (heads + 2 * kv_heads) * dim, threads), tokens, [&](long token) {
        const float *c = cos + token * half, *s = sin + token * half;
        for (long head = 0; head < heads; head++) rotate(q + token * q_stride + head * dim, c, s, half);
        for (long head = 0; head < kv_heads; head++) rotate(k + token * k_stride + head * dim, c, s, half);
        for (long head = 0; head < kv_heads; head++) {
            const long at = slots[token] * wide + head * head_bytes(type, dim);
            write_head(k + token * k_stride + head * dim, dim, type, keys + at);
            write_head(v + token * v_stride + head * dim, dim, type, values + at);
        }
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
