// Chunks as floats, multiplied in vectors: for every type of cache, on every instruction set.
#pragma once

#include "attend_many.h"
#include "stored.h"

constexpr int TILE = W == 16 ? 8 : 4;
// Keys, or features of values, that are multiplied with the queries at a time.

// sum [N][MV] over `count` steps: in step i panel [count][LANES] times factor(i, n).
template <int N, typename Factor>
INLINE void multiply(const float* panel, long count, vf (&sum)[N][MV], Factor&& factor) {
    // Unrolled, the loop is short enough for its end to be foreseen.
#pragma GCC unroll 4
    for (long i = 0; i < count; i++) {
        vf x[MV];
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) x[m] = load(panel + (i * MV + m) * W);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const vf one = splat(factor(i, n));
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) sum[n][m] = fused(one, x[m], sum[n][m]);
        }
    }
}

// A chunk of one key/value head as floats: where they lie, or widened.
struct Wide {
    struct Session {};

    const float* keys[CHUNK];
    const float* values[CHUNK];
    float key_scales[CHUNK], value_scales[CHUNK];  // of int8

    static long memory(const Attention& op) { return 2 * CHUNK * op.dim; }

    static long width(const Attention& op) { return op.dim; }

    static void prepare(const Attention&, float*) {}

    const float* scales(const Attention& op) const { return op.type == INT8 ? value_scales : nullptr; }

    void fill(const Attention& op, const Chunk& chunk, long kv_head, float* memory) {
        const long head = kv_head * head_bytes(op.type, op.dim);
        widen(op, chunk, op.keys + head, memory, keys, key_scales);
        widen(op, chunk, op.values + head, memory + CHUNK * op.dim, values, value_scales);
    }

   private:
    static void widen(const Attention& op, const Chunk& chunk, const char* cache, float* memory, const float** rows,
                      float* scales) {
        for (long i = 0; i < CHUNK; i++) {
            const char* from = cache + chunk.offsets[i];
            float* to = memory + std::clamp(i, chunk.from, chunk.to - 1) * op.dim;
            rows[i] = op.type == FLOAT32 ? reinterpret_cast<const float*>(from) : to;
            if (op.type == FLOAT32 || i < chunk.from || i >= chunk.to) continue;
            if (op.type == BFLOAT16) {
                as_floats(reinterpret_cast<const uint16_t*>(from), op.dim, to);
            } else {
                std::memcpy(scales + i, from + op.dim, sizeof(float));
                long d = 0;
                for (; d + W <= op.dim; d += W) {
                    vf run[1];
                    load_run<INT8>(from + d, run);
                    store(to + d, run[0]);
                }
                for (; d < op.dim; d++) to[d] = static_cast<float>(static_cast<int8_t>(from[d]));
            }
        }
    }
};

template <bool SCALED>
inline void score(const Span& span, const Wide& wide, const float* queries, long dim, float* scores) {
    for (long token = span.from / TILE * TILE; token < span.to; token += TILE) {
        const float* rows[TILE];
        std::copy(wide.keys + token, wide.keys + token + TILE, rows);
        vf sum[TILE][MV] = {};
        multiply<TILE>(queries, dim, sum, [&](long i, int n) INLINE_LAMBDA { return rows[n][i]; });
#pragma GCC unroll 8
        for (int n = 0; n < TILE; n++)
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++)
                store(scores + ((token + n) * MV + m) * W,
                      SCALED ? sum[n][m] * splat(wide.key_scales[token + n]) : sum[n][m]);
    }
}

inline void score(const Span& span, const Wide& wide, const float* queries, const Attention& op, float* scores) {
    if (op.type == INT8)
        score<true>(span, wide, queries, op.dim, scores);
    else
        score<false>(span, wide, queries, op.dim, scores);
}

// acc [dim][LANES], N features from `d` on, times `shrink`, plus the values times weights [CHUNK][LANES].
template <int N>
INLINE void mix_tile(const Span& span, const Wide& wide, const float* weights, const vf (&shrink)[MV], long d,
                     float* acc) {
    vf sum[N][MV];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) sum[n][m] = opaque(load(acc + ((d + n) * MV + m) * W) * shrink[m]);
    const float* const* rows = wide.values + span.from;
    multiply<N>(weights + span.from * LANES, span.to - span.from, sum,
                [&](long i, int n) INLINE_LAMBDA { return rows[i][d + n]; });
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) store(acc + ((d + n) * MV + m) * W, sum[n][m]);
}

inline void mix(const Span& span, const Wide& wide, const float* weights, const vf (&shrink)[MV], long dim, float* acc) {
    long d = 0;
    for (; d + TILE <= dim; d += TILE) mix_tile<TILE>(span, wide, weights, shrink, d, acc);
    for (; d < dim; d++) mix_tile<1>(span, wide, weights, shrink, d, acc);
}
