// Attention of one token: the heads that share a key/value head are few, so a vector lies along head_dim.
#include <algorithm>

#include "attention.h"

namespace {

constexpr int MOST = W == 16 ? 4 : 2;
// Queries at a time: what the registers hold.

// scores [R][CHUNK] of tokens begin to end, fewer than CHUNK.
template <int R, int NV>
void score(const Attention& op, const float* q, long row, long kv_head, long begin, long end, float* scores) {
    for (long token = begin; token < end; token += W) {
        const int count = static_cast<int>(std::min<long>(W, end - token));
        const float* keys[W];
        for (int i = 0; i < W; i++) keys[i] = op.keys + op.offset(row, token + std::min(i, count - 1), kv_head);
        for (int r = 0; r < R; r++) {
            vf query[NV];
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) query[v] = load(q + r * op.dim + v * W);
            vf parts[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                vf part = query[0] * load(keys[i]);
#pragma GCC unroll 16
                for (int v = 1; v < NV; v++) part += query[v] * load(keys[i] + v * W);
                parts[i] = part;
            }
            store(scores + r * CHUNK + (token - begin), sums(parts) * splat(op.scale));
        }
    }
}

// acc [R][dim] += weights [R][CHUNK] times the values of tokens begin to end, S vectors of each at a time.
template <int R, int NV>
void mix(const Attention& op, const float* weights, long row, long kv_head, long begin, long end, float* acc) {
    constexpr int S = W == 4 || NV % 4 ? 2 : 4;
    static_assert(NV % S == 0);
    const float* values[CHUNK];
    for (long token = begin; token < end; token++) values[token - begin] = op.values + op.offset(row, token, kv_head);
    for (int part = 0; part < NV; part += S) {
        vf sum[R][S];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < S; v++) sum[r][v] = load(acc + r * op.dim + (part + v) * W);
        for (long i = 0; i < end - begin; i++) {
            vf value[S];
#pragma GCC unroll 4
            for (int v = 0; v < S; v++) value[v] = load(values[i] + (part + v) * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vf weight = splat(weights[r * CHUNK + i]);
#pragma GCC unroll 4
                for (int v = 0; v < S; v++) sum[r][v] += weight * value[v];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < S; v++) store(acc + r * op.dim + (part + v) * W, sum[r][v]);
    }
}

template <int R, int NV>
void attend(const Attention& op, const float* q, long row, long kv_head, long begin, long end, float* acc,
            float* total, float* top) {
    alignas(64) float scores[R * CHUNK + W];
    for (int r = 0; r < R; r++) {
        top[r] = LOWEST;
        total[r] = 0.0f;
    }
    std::fill(acc, acc + R * op.dim, 0.0f);
    for (long chunk = begin; chunk < end; chunk += CHUNK) {
        const long stop = std::min(end, chunk + CHUNK);
        const long count = stop - chunk;
        score<R, NV>(op, q, row, kv_head, chunk, stop, scores);
        for (int r = 0; r < R; r++) {
            float* line = scores + r * CHUNK;
            for (long i = count; i < CHUNK; i++) line[i] = 2 * LOWEST;
            vf most = load(line);
            for (long i = W; i < CHUNK; i += W) most = max(most, load(line + i));
            float highest = top[r];
            for (int i = 0; i < W; i++) highest = std::max(highest, most[i]);
            vf weights_sum = {};
            for (long i = 0; i < CHUNK; i += W) {
                const vf weight = exp(load(line + i) - splat(highest));
                weights_sum += weight;
                store(line + i, weight);
            }
            if (highest > top[r]) {
                const float shrink = exp(splat(top[r] - highest))[0];
                total[r] *= shrink;
                for (long d = 0; d < op.dim; d++) acc[r * op.dim + d] *= shrink;
                top[r] = highest;
            }
            total[r] += sum(weights_sum);
        }
        mix<R, NV>(op, scores, row, kv_head, chunk, stop, acc);
    }
}

template <int NV>
void attend_heads(const Attention& op, const float* q, long row, long kv_head, long begin, long end, float* acc,
                  float* total, float* top) {
    long left = op.group();
    while (left > 0) {
        const long some = left >= MOST ? MOST : left;
        if constexpr (MOST == 4) {
            if (some == 4) attend<4, NV>(op, q, row, kv_head, begin, end, acc, total, top);
            if (some == 3) attend<3, NV>(op, q, row, kv_head, begin, end, acc, total, top);
        }
        if (some == 2) attend<2, NV>(op, q, row, kv_head, begin, end, acc, total, top);
        if (some == 1) attend<1, NV>(op, q, row, kv_head, begin, end, acc, total, top);
        q += some * op.dim;
        acc += some * op.dim;
        total += some;
        top += some;
        left -= some;
    }
}

}  // namespace

bool can_attend_one(long dim) { return dim == 64 || dim == 96 || dim == 128; }

void attend_one(const Attention& op, long row, long token, long kv_head, long begin, long end, float* acc,
                float* total, float* top) {
    const float* q = op.q + token * op.q_stride + kv_head * op.group() * op.dim;
    switch (op.dim) {
        case 64: return attend_heads<64 / W>(op, q, row, kv_head, begin, end, acc, total, top);
        case 96: return attend_heads<96 / W>(op, q, row, kv_head, begin, end, acc, total, top);
        case 128: return attend_heads<128 / W>(op, q, row, kv_head, begin, end, acc, total, top);
    }
}
