// Attention of one token: the heads that share a key/value head are few, so a vector lies along head_dim.
#include "attention.h"
#include "scratch.h"

namespace {

constexpr int MOST = 4;
// Queries at a time: what the registers hold.

// The first `count` of a vector, then zeros.
INLINE vf load_some(const float* from, long count) {
    float rest[W] = {};
    for (long i = 0; i < count; i++) rest[i] = from[i];
    return load(rest);
}

// scores [R][CHUNK] of G times W keys from place `token` on; q [R][padded] is scaled. Keys are turned, so that a vector
// holds the same feature of W tokens. `next` will be needed soon.
template <int R, int G>
INLINE void score_some(const float* const* keys, const char* const* next, const float* q, long dim, long padded,
                       float* scores) {
    vf sum[G][R];
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[g][r] = vf{};
    long k = 0;
    for (; k + W <= dim; k += W)
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) {
            vf turned[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                turned[i] = load(keys[g * W + i] + k);
                if (next && k % LINE == 0) prefetch(next[g * W + i] + k * sizeof(float));
            }
            transpose(turned);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[g][r] += turned[i] * splat(q[r * padded + k + i]);
        }
    for (; k < dim; k++)
        for (int g = 0; g < G; g++) {
            vf key;
            for (int i = 0; i < W; i++) key[i] = keys[g * W + i][k];
            for (int r = 0; r < R; r++) sum[g][r] += key * splat(q[r * padded + k]);
        }
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(scores + r * CHUNK + g * W, sum[g][r]);
}

template <int R>
void score(const Chunk& chunk, const Rows& keys, const char* const* next, const float* q, long dim, long padded,
           float* scores) {
    long token = chunk.from / W * W;
    // Two at a time: the sums of one wait for each other while the other's keys are turned.
    for (; token + W < chunk.to; token += 2 * W)
        score_some<R, 2>(keys.at + token, next ? next + token : nullptr, q, dim, padded, scores + token);
    if (token < chunk.to)
        score_some<R, 1>(keys.at + token, next ? next + token : nullptr, q, dim, padded, scores + token);
}

// What comes after a chunk's head: the keys at the same places, in the cache, and how far from them their values lie.
struct Ahead {
    const char* keys[CHUNK];
    long values;  // or 0: those are asked for elsewhere
    long bytes;

    INLINE void fetch(long place) const {
        for (long byte = 0; byte < bytes; byte += 64) {
            prefetch(keys[place] + byte);
            if (values) prefetch(keys[place] + values + byte);
        }
    }
};

// acc [R][padded], S vectors from feature d on, plus values times weights [R][CHUNK]; of the last vector `some`.
template <int R, int S, bool WHOLE>
INLINE void mix_some(const Chunk& chunk, const Rows& values, const Ahead* ahead, const float* weights, long d,
                     long some, long padded, float* acc) {
    vf sum[R][S];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < S; v++) sum[r][v] = load(acc + r * padded + d + v * W);
    for (long i = chunk.from; i < chunk.to; i++) {
        const float* from = values.at[i] + d;
        if (ahead) ahead->fetch(i);
        vf value[S];
#pragma GCC unroll 4
        for (int v = 0; v < S; v++) value[v] = WHOLE ? load(from + v * W) : load_some(from, some);
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
        for (int v = 0; v < S; v++) store(acc + r * padded + d + v * W, sum[r][v]);
}

template <int R>
void mix(const Chunk& chunk, const Rows& values, const Ahead* ahead, const float* weights, long dim, long padded,
         float* acc) {
    constexpr int S = W == 16 ? 4 : 2;
    long d = 0;
    for (; d + S * W <= dim; d += S * W, ahead = nullptr)
        mix_some<R, S, true>(chunk, values, ahead, weights, d, W, padded, acc);
    for (; d + W <= dim; d += W, ahead = nullptr)
        mix_some<R, 1, true>(chunk, values, ahead, weights, d, W, padded, acc);
    if (d < dim) mix_some<R, 1, false>(chunk, values, ahead, weights, d, dim - d, padded, acc);
}

// Scores of a chunk [CHUNK] become weights; `acc` [padded], what was summed up so far, shrinks to fit.
INLINE void soften(const Attention& op, const Chunk& chunk, float* scores, float* acc, float& total, float& top) {
    if (op.softcap > 0.0f)
        for (long i = chunk.from / W * W; i < chunk.to; i += W) store(scores + i, op.capped(load(scores + i)));
    std::fill(scores, scores + chunk.from, UNSEEN);
    std::fill(scores + chunk.to, scores + CHUNK, UNSEEN);
    vf most = load(scores);
    for (int i = W; i < CHUNK; i += W) most = max(most, load(scores + i));
    float highest = top;
    for (int i = 0; i < W; i++) highest = std::max(highest, most[i]);
    vf weights = {};
    for (int i = 0; i < CHUNK; i += W) {
        const vf weight = exp2(load(scores + i) - splat(highest));
        weights += weight;
        store(scores + i, weight);
    }
    const vf shrink = exp2(splat(top) - splat(highest));
    if (highest > top)
        for (long d = 0; d < op.padded(); d += W) store(acc + d, load(acc + d) * shrink);
    top = highest;
    total = fused(splat(total), shrink, splat(sum(weights)))[0];
}

// R heads against a chunk of one key/value head.
template <int R>
void attend(const Attention& op, const Chunk& chunk, const Rows& keys, const Rows& values, const Ahead* ahead,
            const float* q, float* acc, float* total, float* top) {
    alignas(64) float scores[R * CHUNK];
    const char* const* next = ahead && op.type == FLOAT32 ? values.stored : nullptr;
    score<R>(chunk, keys, next, q, op.dim, op.padded(), scores);
    for (int r = 0; r < R; r++) soften(op, chunk, scores + r * CHUNK, acc + r * op.padded(), total[r], top[r]);
    mix<R>(chunk, values, ahead, scores, op.dim, op.padded(), acc);
}

// `partial`: see `partial_size`; q [group][padded] is scaled.
void attend_heads(const Attention& op, const Chunk& chunk, const Rows& keys, const Rows& values, const Ahead& next,
                  const float* q, float* partial) {
    const long padded = op.padded();
    float *total = partial + op.group() * padded, *top = total + op.group();
    const Ahead* ahead = &next;
    for (long first = 0; first < op.group(); first += MOST, ahead = nullptr) {
        const float* from = q + first * padded;
        float* acc = partial + first * padded;
        switch (std::min<long>(op.group() - first, MOST)) {
            case 4: attend<4>(op, chunk, keys, values, ahead, from, acc, total + first, top + first); break;
            case 3: attend<3>(op, chunk, keys, values, ahead, from, acc, total + first, top + first); break;
            case 2: attend<2>(op, chunk, keys, values, ahead, from, acc, total + first, top + first); break;
            case 1: attend<1>(op, chunk, keys, values, ahead, from, acc, total + first, top + first); break;
        }
    }
}

void scale_queries(const Attention& op, const float* from, long count, float* to) {
    const float scale = op.query_scale();
    for (long i = 0; i < count; i++)
        for (long d = 0; d < op.dim; d++) to[i * op.padded() + d] = from[i * op.dim + d] * scale;
}

}  // namespace

void attend_one(const Attention& op, long row, long kv_head, long kv_end, long begin, long end, float* partials) {
    static thread_local Scratch scratch;
    const long heads = kv_end - kv_head, group = op.group(), padded = op.padded(), size = partial_size(op);
    float* queries = scratch.floats(static_cast<size_t>(heads * group * padded + 2 * CHUNK * op.dim));
    float* wide_keys = queries + heads * group * padded;
    float* wide_values = wide_keys + CHUNK * op.dim;
    scale_queries(op, op.q + op.extents[3 * row] * op.q_stride + kv_head * group * op.dim, heads * group, queries);
    for (long head = 0; head < heads; head++) {
        float* tops = partials + head * size + group * (padded + 1);
        std::fill(partials + head * size, tops, 0.0f);
        std::fill(tops, tops + group, LOWEST);
    }
    Chunk chunk(op, row, begin, end);
    while (true) {
        const long after = chunk.base + CHUNK;
        const Chunk next = after < end ? Chunk(op, row, after, end) : chunk;
        for (long head = 0; head < heads; head++) {
            Rows keys(op, chunk, op.keys, kv_head + head), values(op, chunk, op.values, kv_head + head);
            keys.widen(op, chunk, wide_keys);
            values.widen(op, chunk, wide_values);
            const bool last = head + 1 == heads;
            Ahead ahead;
            ahead.bytes = head_bytes(op.type, op.dim);
            ahead.values = op.type == FLOAT32 ? 0 : op.values - op.keys;
            const char* from = op.keys + (last ? kv_head : kv_head + head + 1) * ahead.bytes;
            for (int i = 0; i < CHUNK; i++) ahead.keys[i] = from + (last ? next : chunk).offsets[i];
            attend_heads(op, chunk, keys, values, ahead, queries + head * group * padded, partials + head * size);
        }
        if (after >= end) return;
        chunk = next;
    }
}
