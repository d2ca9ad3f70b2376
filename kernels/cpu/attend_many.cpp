// Attention of many tokens of one row: a vector lies along the queries, which are pairs of position and head.
#include <algorithm>
#include <vector>

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

void score(const Attention& op, const Tokens& tokens, const float* queries, long begin, long end, float* scores) {
    const long stride = tokens.stride();
    for (long token = begin, run; token < end; token += run) {
        run = tokens.run_length(token, end);
        const float* keys = tokens.at(token);
        float* to = scores + (token - begin) * LANES;
        long i = 0;
        for (; i + TILE <= run; i += TILE)
            score_tile<TILE>(queries, keys + i * stride, stride, op.dim, to + i * LANES);
        for (; i < run; i++) score_tile<1>(queries, keys + i * stride, stride, op.dim, to + i * LANES);
    }
}

void mix(const Attention& op, const Tokens& tokens, const float* weights, long begin, long end, float* acc) {
    const long stride = tokens.stride();
    for (long token = begin, run; token < end; token += run) {
        run = tokens.run_length(token, end);
        const float* values = tokens.at(token);
        const float* from = weights + (token - begin) * LANES;
        long d = 0;
        for (; d + TILE <= op.dim; d += TILE) mix_tile<TILE>(from, values + d, stride, run, acc + d * LANES);
        for (; d < op.dim; d++) mix_tile<1>(from, values + d, stride, run, acc + d * LANES);
    }
}

// What online softmax knows of each query.
struct Softmax {
    vf total[MV], top[MV];

    Softmax() {
        for (int m = 0; m < MV; m++) {
            total[m] = vf{};
            top[m] = splat(LOWEST);
        }
    }

    // Scores [count][LANES] become weights, what was summed so far in acc [dim][LANES] shrinks to fit.
    void soften(float* scores, const vf (&last)[MV], long begin, long count, long dim, float* acc) {
        for (int m = 0; m < MV; m++) {
            vf highest = top[m];
            for (long i = 0; i < count; i++) {
                float* at = scores + (i * MV + m) * W;
                const vf seen = last[m] >= splat(static_cast<float>(begin + i)) ? load(at) : splat(2 * LOWEST);
                store(at, seen);
                highest = max(highest, seen);
            }
            const vf shrink = exp(top[m] - highest);
            vf sums[W] = {};
            for (long i = 0; i < count; i++) {
                float* at = scores + (i * MV + m) * W;
                const vf weight = exp(load(at) - highest);
                sums[i % W] += weight;
                store(at, weight);
            }
            for (int step = W / 2; step > 0; step /= 2)  // as `sum` adds the lanes of a vector
                for (int i = 0; i < step; i++) sums[i] += sums[i + step];
            total[m] = fused(total[m], shrink, sums[0]);
            top[m] = highest;
            for (long d = 0; d < dim; d++) {
                float* at = acc + (d * MV + m) * W;
                store(at, load(at) * shrink);
            }
        }
    }
};

// Joins the parts of a row, each [dim][LANES], into the first: as attention.cpp's `join` does for single tokens. The
// maxima in `of` become the parts' weights.
void join(float* parts, Softmax* of, long count, long dim, vf (&total)[MV]) {
    for (int m = 0; m < MV; m++) {
        vf top = of[0].top[m];
        for (long i = 1; i < count; i++) top = max(top, of[i].top[m]);
        total[m] = vf{};
        for (long i = 0; i < count; i++) {
            of[i].top[m] = exp(of[i].top[m] - top);
            total[m] = fused(of[i].top[m], of[i].total[m], total[m]);
        }
        for (long d = 0; d < dim; d++) {
            float* at = parts + (d * MV + m) * W;
            vf joined = {};
            for (long i = 0; i < count; i++) joined = fused(of[i].top[m], load(at + i * dim * LANES), joined);
            store(at, joined);
        }
    }
}

}  // namespace

long positions_at_once(const Attention& op) { return std::max(1L, LANES / op.group()); }

void attend_many(const Attention& op, long row, long first, long count, long kv_head) {
    static thread_local Scratch scratch;
    static thread_local std::vector<Softmax> softmax;
    const long group = op.group(), lanes = count * group, dim = op.dim;
    const long start = op.extents[3 * row], context = op.extents[3 * row + 2];
    const long end = context + first + count;
    const long parts = (end + PART - 1) / PART;
    float* queries = scratch.floats(static_cast<size_t>(((1 + parts) * dim + CHUNK) * LANES + CHUNK * dim));
    float* scores = queries + dim * LANES;
    float* widened = scores + CHUNK * LANES;
    float* sums = widened + CHUNK * dim;
    // More heads than lanes share a key/value head only in theory: then a part of them at a time.
    for (long done = 0; done < lanes; done += LANES) {
        const long some = std::min<long>(LANES, lanes - done);
        std::fill(queries, queries + dim * LANES, 0.0f);
        std::fill(sums, sums + parts * dim * LANES, 0.0f);
        softmax.assign(static_cast<size_t>(parts), Softmax());
        float limits[LANES];
        for (long lane = 0; lane < LANES; lane++) {
            const long position = first + (done + std::min(lane, some - 1)) / group;
            limits[lane] = static_cast<float>(context + position);
            if (lane >= some) continue;
            const float* q = op.q + (start + position) * op.q_stride + (kv_head * group + (done + lane) % group) * dim;
            for (long d = 0; d < dim; d++) queries[d * LANES + lane] = q[d] * op.scale;
        }
        vf last[MV];
        for (int m = 0; m < MV; m++) last[m] = load(limits + m * W);
        for (long chunk = 0; chunk < end; chunk += CHUNK) {
            const long stop = std::min(end, chunk + CHUNK);
            float* acc = sums + chunk / PART * dim * LANES;
            score(op, Tokens(op, op.keys, row, kv_head, chunk, stop, widened), queries, chunk, stop, scores);
            softmax[static_cast<size_t>(chunk / PART)].soften(scores, last, chunk, stop - chunk, dim, acc);
            mix(op, Tokens(op, op.values, row, kv_head, chunk, stop, widened), scores, chunk, stop, acc);
        }
        vf total[MV];
        join(sums, softmax.data(), parts, dim, total);
        for (long lane = 0; lane < some; lane++) {
            const long position = first + (done + lane) / group;
            const float one = 1.0f / total[lane / W][lane % W];
            float* out = op.out + ((start + position) * op.heads + kv_head * group + (done + lane) % group) * dim;
            for (long d = 0; d < dim; d++) out[d] = sums[d * LANES + lane] * one;
        }
    }
}
