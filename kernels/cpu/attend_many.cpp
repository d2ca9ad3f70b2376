// Attention of many tokens of one row: a vector lies along the queries, which are pairs of position and head.
#include <algorithm>

#include "attention.h"
#include "panel.h"
#include "scratch.h"

namespace {

constexpr int MV = MOST_VECTORS;
constexpr int TILE = W == 16 ? 8 : 2;
// Keys, or features of values, that are multiplied with a panel of queries at a time.

// sum [N][MV] over `count` steps: row n of `broadcast` is `across` floats from the next, a step is `along`.
template <int N>
INLINE void multiply(const float* panel, const float* broadcast, long across, long along, long count,
                     vf (&sum)[N][MV]) {
    for (long i = 0; i < count; i++) {
        vf x[MV];
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) x[m] = load(panel + (i * MV + m) * W);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const vf factor = splat(broadcast[n * across + i * along]);
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) sum[n][m] += factor * x[m];
        }
    }
}

template <int N>
INLINE void load_tile(const float* from, vf (&tile)[N][MV]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) tile[n][m] = load(from + (n * MV + m) * W);
}

template <int N>
INLINE void store_tile(const vf (&tile)[N][MV], float* to) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) store(to + (n * MV + m) * W, tile[n][m]);
}

// scores [N][LANES] of N keys.
template <int N>
INLINE void score_tile(const float* queries, const float* keys, long stride, long dim, float* scores) {
    vf sum[N][MV] = {};
    multiply<N>(queries, keys, stride, 1, dim, sum);
    store_tile<N>(sum, scores);
}

// acc [N][LANES] += N features of `count` values times weights [count][LANES].
template <int N>
INLINE void mix_tile(const float* weights, const float* values, long stride, long count, float* acc) {
    vf sum[N][MV];
    load_tile<N>(acc, sum);
    multiply<N>(weights, values, 1, stride, count, sum);
    store_tile<N>(sum, acc);
}

// Tokens from `token` that lie one after the other in the cache, up to `end`.
INLINE long run_length(const Attention& op, long token, long end) {
    return std::min(end, (token / op.block_size + 1) * op.block_size) - token;
}

void score(const Attention& op, const float* queries, long row, long kv_head, long begin, long end, float* scores) {
    const long stride = op.token_stride();
    for (long token = begin, run; token < end; token += run) {
        run = run_length(op, token, end);
        const float* keys = op.keys + op.offset(row, token, kv_head);
        float* to = scores + (token - begin) * LANES;
        long i = 0;
        for (; i + TILE <= run; i += TILE)
            score_tile<TILE>(queries, keys + i * stride, stride, op.dim, to + i * LANES);
        for (; i < run; i++) score_tile<1>(queries, keys + i * stride, stride, op.dim, to + i * LANES);
    }
}

void mix(const Attention& op, const float* weights, long row, long kv_head, long begin, long end, float* acc) {
    const long stride = op.token_stride();
    for (long token = begin, run; token < end; token += run) {
        run = run_length(op, token, end);
        const float* values = op.values + op.offset(row, token, kv_head);
        const float* from = weights + (token - begin) * LANES;
        long d = 0;
        for (; d + TILE <= op.dim; d += TILE) mix_tile<TILE>(from, values + d, stride, run, acc + d * LANES);
        for (; d < op.dim; d++) mix_tile<1>(from, values + d, stride, run, acc + d * LANES);
    }
}

// One step of online softmax: scores [count][LANES] become weights, what was summed so far shrinks to fit.
void soften(float* scores, const vf (&last)[MV], long begin, long count, long dim, float* acc, vf (&total)[MV],
            vf (&top)[MV]) {
    for (int m = 0; m < MV; m++) {
        vf highest = top[m];
        for (long i = 0; i < count; i++) {
            float* at = scores + (i * MV + m) * W;
            const vf seen = last[m] >= splat(static_cast<float>(begin + i)) ? load(at) : splat(2 * LOWEST);
            store(at, seen);
            highest = max(highest, seen);
        }
        const vf shrink = exp(top[m] - highest);
        vf sum = {};
        for (long i = 0; i < count; i++) {
            float* at = scores + (i * MV + m) * W;
            const vf weight = exp(load(at) - highest);
            sum += weight;
            store(at, weight);
        }
        total[m] = total[m] * shrink + sum;
        top[m] = highest;
        for (long d = 0; d < dim; d++) {
            float* at = acc + (d * MV + m) * W;
            store(at, load(at) * shrink);
        }
    }
}

}  // namespace

long positions_at_once(const Attention& op) { return std::max(1L, LANES / op.group()); }

void attend_many(const Attention& op, long row, long first, long count, long kv_head) {
    static thread_local Scratch scratch;
    const long group = op.group(), lanes = count * group, dim = op.dim;
    const long start = op.extents[3 * row], context = op.extents[3 * row + 2];
    float* queries = scratch.floats(static_cast<size_t>(2 * dim + CHUNK) * LANES);
    float* acc = queries + dim * LANES;
    float* scores = acc + dim * LANES;
    // More heads than lanes share a key/value head only in theory: then a part of them at a time.
    for (long done = 0; done < lanes; done += LANES) {
        const long some = std::min<long>(LANES, lanes - done);
        std::fill(queries, queries + 2 * dim * LANES, 0.0f);
        float limits[LANES];
        for (long lane = 0; lane < LANES; lane++) {
            const long position = first + (done + std::min(lane, some - 1)) / group;
            limits[lane] = static_cast<float>(context + position);
            if (lane >= some) continue;
            const float* q = op.q + (start + position) * op.q_stride + (kv_head * group + (done + lane) % group) * dim;
            for (long d = 0; d < dim; d++) queries[d * LANES + lane] = q[d] * op.scale;
        }
        vf last[MV], total[MV] = {}, top[MV];
        for (int m = 0; m < MV; m++) {
            last[m] = load(limits + m * W);
            top[m] = splat(LOWEST);
        }
        const long end = context + first + count;
        for (long chunk = 0; chunk < end; chunk += CHUNK) {
            const long stop = std::min(end, chunk + CHUNK);
            score(op, queries, row, kv_head, chunk, stop, scores);
            soften(scores, last, chunk, stop - chunk, dim, acc, total, top);
            mix(op, scores, row, kv_head, chunk, stop, acc);
        }
        for (long lane = 0; lane < some; lane++) {
            const long position = first + (done + lane) / group;
            const float one = 1.0f / total[lane / W][lane % W];
            float* out = op.out + ((start + position) * op.heads + kv_head * group + (done + lane) % group) * dim;
            for (long d = 0; d < dim; d++) out[d] = acc[d * LANES + lane] * one;
        }
    }
}
