// Attention of one token: the heads that share a key/value head are few, so a vector lies along head_dim.
#include <algorithm>

#include "attention.h"

namespace {

constexpr int MOST = W == 16 ? 4 : 2;
// Queries at a time: what the registers hold.

// scores [R][CHUNK] of tokens begin to end, fewer than CHUNK; q [R][dim] is scaled. Keys are turned, so that a vector
// holds the same feature of W tokens.
template <int R, int NV>
void score(const Tokens& keys, const float* q, long dim, long begin, long end, float* scores) {
    for (long token = begin; token < end; token += W) {
        const int count = static_cast<int>(std::min<long>(W, end - token));
        const float* rows[W];
        for (int i = 0; i < W; i++) rows[i] = keys.at(token + std::min(i, count - 1));
        vf sum[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r] = vf{};
        for (int v = 0; v < NV; v++) {
            vf turned[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) turned[i] = load(rows[i] + v * W);
            transpose(turned);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[r] += turned[i] * splat(q[r * dim + v * W + i]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(scores + r * CHUNK + (token - begin), sum[r]);
    }
}

// acc [R][dim] += weights [R][CHUNK] times the values of tokens begin to end, S vectors of each at a time.
template <int R, int NV>
void mix(const Tokens& tokens, const float* weights, long dim, long begin, long end, float* acc) {
    constexpr int S = W == 4 || NV % 4 ? 2 : 4;
    static_assert(NV % S == 0);
    const float* values[CHUNK];
    for (long token = begin; token < end; token++) values[token - begin] = tokens.at(token);
    for (int part = 0; part < NV; part += S) {
        vf sum[R][S];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < S; v++) sum[r][v] = load(acc + r * dim + (part + v) * W);
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
            for (int v = 0; v < S; v++) store(acc + r * dim + (part + v) * W, sum[r][v]);
    }
}

template <int R, int NV>
void attend(const Attention& op, const float* q, long row, long kv_head, long begin, long end, float* acc,
            float* total, float* top) {
    constexpr long DIM = NV * W;
    alignas(64) float scores[R * CHUNK + W];
    alignas(64) float scaled[R * DIM], widened[CHUNK * DIM];
    for (long i = 0; i < R * DIM; i++) scaled[i] = q[i] * op.scale;
    for (int r = 0; r < R; r++) {
        top[r] = LOWEST;
        total[r] = 0.0f;
    }
    std::fill(acc, acc + R * DIM, 0.0f);
    for (long chunk = begin; chunk < end; chunk += CHUNK) {
        const long stop = std::min(end, chunk + CHUNK);
        const long count = stop - chunk;
        score<R, NV>(Tokens(op, op.keys, row, kv_head, chunk, stop, widened), scaled, DIM, chunk, stop, scores);
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
            const vf shrink = exp(splat(top[r]) - splat(highest));
            if (highest > top[r])
                for (long d = 0; d < DIM; d += W) store(acc + r * DIM + d, load(acc + r * DIM + d) * shrink);
            top[r] = highest;
            total[r] = fused(splat(total[r]), shrink, splat(sum(weights_sum)))[0];
        }
        mix<R, NV>(Tokens(op, op.values, row, kv_head, chunk, stop, widened), scores, DIM, chunk, stop, acc);
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
