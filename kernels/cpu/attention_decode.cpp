// Attention of one token: the heads that share a key/value head are few, so a vector lies along tokens for scores and
// along head_dim for values. What is stored goes from memory to registers and nowhere else.
#include "kv_cache.h"
#include "scratch.h"

namespace {

// Queries that are multiplied at a time, at most: registers hold their sums.
constexpr int MAX_QUERIES = 4;

// Some tokens of one key/value head: place i is at `keys` + offsets[i], and at `values` + offsets[i].
struct HeadPointers {
    const char* keys;
    const char* values;
    const long* offsets;

    HeadPointers(const Attention& op, const Chunk& chunk, long kv_head) : offsets(chunk.offsets) {
        const long head = kv_head * head_bytes(op.type, op.dim);
        keys = op.keys + head;
        values = op.values + head;
    }

    HeadPointers(const char* keys, const char* values, const long* offsets)
        : keys(keys), values(values), offsets(offsets) {}
};

// Features that are loaded at once: shorter heads are copied with zeros behind them.
template <int TYPE>
constexpr int MIN_HEAD_DIM = std::max(WINDOW_FEATURES<TYPE>, RUN_FEATURES<TYPE>);

// The scales of int8 heads at each place; empty for other types.
template <int TYPE>
struct HeadScales {
    alignas(64) float keys[TYPE == INT8 ? CHUNK_TOKENS : 1];
    alignas(64) float values[TYPE == INT8 ? CHUNK_TOKENS : 1];

    INLINE HeadScales(const HeadPointers& heads, const Chunk& chunk, long dim) {
        if constexpr (TYPE == INT8)
            for (long i = chunk.first_vector(); i < chunk.end_vector(); i++) {
                std::memcpy(keys + i, heads.keys + heads.offsets[i] + dim, sizeof(float));
                std::memcpy(values + i, heads.values + heads.offsets[i] + dim, sizeof(float));
            }
    }

    INLINE vf of_keys(vf score, long at) const { return TYPE == INT8 ? score * load(keys + at) : score; }
    INLINE vf of_values(vf weight, long at) const { return TYPE == INT8 ? weight * load(values + at) : weight; }
};

// Prefetches the lines from `from` on that begin within `bytes`, and that of the last byte.
INLINE void prefetch_bytes(const char* from, long bytes) {
    for (long byte = 0; byte < bytes; byte += 4 * FLOATS_PER_CACHE_LINE) prefetch(from + byte);
    if (bytes % (4 * FLOATS_PER_CACHE_LINE) != 0) prefetch(from + bytes - 1);
}

// sum [G][R] plus features `skip` on of a window at `from`, times q [R][padded]. Keys are transposed, so that a vector
// holds the same feature of W tokens.
template <int TYPE, int R, int G, bool WHOLE>
INLINE void score_window(const char* from, const long* offsets, const float* q, long padded, long skip,
                         vf (&sum)[G][R]) {
    vi transposed[G][TRANSPOSED];
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) load_transposed(from, offsets + g * W, transposed[g]);
    if constexpr (WHOLE) {
#pragma GCC unroll 8
        for (int i = 0; i < TRANSPOSED; i++)
#pragma GCC unroll 4
            for (int p = 0; p < VALUES_PER_LANE<TYPE>; p++)
#pragma GCC unroll 2
                for (int g = 0; g < G; g++) {
                    const vf key = unpacked<TYPE>(transposed[g][i], p);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        sum[g][r] = fmadd(key, splat(q[r * padded + i * VALUES_PER_LANE<TYPE> + p]), sum[g][r]);
                }
    } else {
        for (long k = skip; k < WINDOW_FEATURES<TYPE>; k++)
            for (int g = 0; g < G; g++) {
                const vf key = unpacked<TYPE>(transposed[g][k / VALUES_PER_LANE<TYPE>],
                                              static_cast<int>(k % VALUES_PER_LANE<TYPE>));
                for (int r = 0; r < R; r++) sum[g][r] = fmadd(key, splat(q[r * padded + k]), sum[g][r]);
            }
    }
}

// The same for `ROUNDS_TO_BFLOAT16`: products with features at even places are added to parts [G][R][0], others to [1].
template <int TYPE, int R, int G, bool WHOLE>
INLINE void score_even_odd(const char* from, const long* offsets, const float* q, long padded, long skip, long place,
                           vf (&parts)[G][R][2]) {
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
        vi transposed[TRANSPOSED];
        load_transposed(from, offsets + g * W, transposed);
        if constexpr (WHOLE) {
#pragma GCC unroll 8
            for (int i = 0; i < TRANSPOSED; i++)
#pragma GCC unroll 2
                for (int p = 0; p < 2; p++) {
                    const vf key = unpacked<TYPE>(transposed[i], p);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        parts[g][r][p] = fmadd(key, splat(q[r * padded + i * 2 + p]), parts[g][r][p]);
                }
        } else {
            for (long k = skip; k < WINDOW_FEATURES<TYPE>; k++) {
                const vf key = unpacked<TYPE>(transposed[k / 2], static_cast<int>(k % 2));
                for (int r = 0; r < R; r++) {
                    vf& part = parts[g][r][(place + k) % 2];
                    part = fmadd(key, splat(q[r * padded + k]), part);
                }
            }
        }
    }
}

// Adds the sums of AMX_DEPTH features, and begins new ones.
template <int R, int G>
INLINE void add_even_odd(vf (&parts)[G][R][2], vf (&sum)[G][R]) {
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            sum[g][r] += parts[g][r][0] + parts[g][r][1];
            parts[g][r][0] = parts[g][r][1] = vf{};
        }
}

// scores [R][CHUNK_TOKENS] of G times W keys from place `at` on; q [R][padded] is scaled. Those of `next` will be
// needed soon.
template <int TYPE, int R, int G>
INLINE void score_some(const HeadPointers& heads, const HeadPointers& next, long at, const float* q, long dim,
                       long padded, float* scores) {
    const long* offsets = heads.offsets + at;
    vf sum[G][R] = {};
    [[maybe_unused]] vf parts[G][R][2] = {};
    long done = 0;
    for (; done + WINDOW_FEATURES<TYPE> <= dim; done += WINDOW_FEATURES<TYPE>) {
        for (long i = at + done * (G * W) / dim; i < at + (done + WINDOW_FEATURES<TYPE>)*(G * W) / dim; i++)
            prefetch_bytes(next.keys + next.offsets[i], head_bytes(TYPE, dim));
        const char* from = heads.keys + done * FEATURE_BYTES<TYPE>;
        if constexpr (ROUNDS_TO_BFLOAT16<TYPE>) {
            score_even_odd<TYPE, R, G, true>(from, offsets, q + done, padded, 0, done, parts);
            if ((done + WINDOW_FEATURES<TYPE>) % AMX_DEPTH == 0) add_even_odd<R, G>(parts, sum);
        } else {
            score_window<TYPE, R, G, true>(from, offsets, q + done, padded, 0, sum);
        }
    }
    if (done < dim) {
        // The last window ends where the head does, and some of it was done before.
        const long begin = dim - WINDOW_FEATURES<TYPE>;
        const char* from = heads.keys + begin * FEATURE_BYTES<TYPE>;
        if constexpr (ROUNDS_TO_BFLOAT16<TYPE>)
            score_even_odd<TYPE, R, G, false>(from, offsets, q + begin, padded, done - begin, begin, parts);
        else
            score_window<TYPE, R, G, false>(from, offsets, q + begin, padded, done - begin, sum);
    }
    if constexpr (ROUNDS_TO_BFLOAT16<TYPE>) add_even_odd<R, G>(parts, sum);
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(scores + r * CHUNK_TOKENS + at + g * W, sum[g][r]);
}

template <int TYPE, int R>
INLINE void score(const Chunk& chunk, const HeadPointers& heads, const HeadPointers& next, const float* q, long dim,
                  long padded, float* scores) {
    long at = chunk.first_vector();
    // Two at a time, because sums wait for each other.
    for (; at + W < chunk.to; at += 2 * W) score_some<TYPE, R, 2>(heads, next, at, q, dim, padded, scores);
    if (at < chunk.to) score_some<TYPE, R, 1>(heads, next, at, q, dim, padded, scores);
    // Another chunk may have more tokens than this one.
    for (long i = chunk.end_vector(); i < CHUNK_TOKENS; i++)
        prefetch_bytes(next.keys + next.offsets[i], head_bytes(TYPE, dim));
}

// sum [R] += N runs of one token's values times its weight for each query, which are CHUNK_TOKENS floats apart.
template <int TYPE, int R, int N, int V = RUN_FEATURES<TYPE> / W>
INLINE void add_values(const char* from, const float* weights, vf (&sum)[R][N * V]) {
    vf weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weight[r] = splat(weights[r * CHUNK_TOKENS]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        vf value[V];
        load_run<TYPE>(from + n * RUN_FEATURES<TYPE> * FEATURE_BYTES<TYPE>, value);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[r][n * V + v] = fmadd(weight[r], value[v], sum[r][n * V + v]);
    }
}

// Prefetches values of the next heads in passes through a chunk, in each those of every `passes`th token: so memory is
// busy all the time, and nothing waits for more lines than can be on their way.
struct ValuePrefetcher {
    const HeadPointers& heads;
    long bytes, passes, left;

    INLINE void step(long i) {
        if (--left > 0) return;
        prefetch_bytes(heads.values + heads.offsets[i], bytes);
        left = passes;
    }
};

// acc [R][padded], N runs from feature `d` on, plus values times weights [R][CHUNK_TOKENS].
template <int TYPE, int R, int N>
INLINE void accumulate_in_order(const Chunk& chunk, const HeadPointers& heads, ValuePrefetcher prefetcher,
                                const float* weights, long d, float* acc, long padded) {
    constexpr int V = RUN_FEATURES<TYPE> / W;
    vf sum[R][N * V];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < N * V; v++) sum[r][v] = load(acc + r * padded + v * W);
    for (long i = chunk.from; i < chunk.to; i++) {
        const char* from = heads.values + heads.offsets[i] + d * FEATURE_BYTES<TYPE>;
        prefetcher.step(i);
        add_values<TYPE, R, N>(from, weights + i, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < N * V; v++) store(acc + r * padded + v * W, sum[r][v]);
}

// The same for `ROUNDS_TO_BFLOAT16`: first the tokens at even places of each AMX_DEPTH, then those at odd ones.
template <int TYPE, int R, int N>
INLINE void accumulate_even_odd(const Chunk& chunk, const HeadPointers& heads, ValuePrefetcher prefetcher,
                                const float* weights, long d, float* acc, long padded) {
    constexpr int V = RUN_FEATURES<TYPE> / W;
    for (long half = chunk.from / AMX_DEPTH * AMX_DEPTH; half < chunk.to; half += AMX_DEPTH) {
        vf parts[2][R][N * V];
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < N * V; v++) parts[part][r][v] = vf{};
            const long begin = std::max(half, chunk.from), end = std::min<long>(half + AMX_DEPTH, chunk.to);
            for (long i = begin + ((begin ^ part) & 1); i < end; i += 2) {
                const char* from = heads.values + heads.offsets[i] + d * FEATURE_BYTES<TYPE>;
                prefetcher.step(i);
                add_values<TYPE, R, N>(from, weights + i, parts[part]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < N * V; v++) {
                float* at = acc + r * padded + v * W;
                store(at, load(at) + (parts[0][r][v] + parts[1][r][v]));
            }
    }
}

template <int TYPE, int R>
INLINE void accumulate(const Chunk& chunk, const HeadPointers& heads, const HeadPointers& next, long bytes,
                       const float* weights, long dim, float* acc, long padded) {
    constexpr int N = (ROUNDS_TO_BFLOAT16<TYPE> && R == MAX_QUERIES ? 2 : W == 16 ? 4 : 2) * W / RUN_FEATURES<TYPE>;
    for (long i = chunk.to; i < CHUNK_TOKENS; i++) prefetch_bytes(next.values + next.offsets[i], bytes);
    ValuePrefetcher prefetcher{next, bytes, (dim + N * RUN_FEATURES<TYPE> - 1) / (N * RUN_FEATURES<TYPE>), 1};
    long d = 0;
    for (; d + N * RUN_FEATURES<TYPE> <= dim; d += N * RUN_FEATURES<TYPE>, prefetcher.left++)
        if constexpr (ROUNDS_TO_BFLOAT16<TYPE>)
            accumulate_even_odd<TYPE, R, N>(chunk, heads, prefetcher, weights, d, acc + d, padded);
        else
            accumulate_in_order<TYPE, R, N>(chunk, heads, prefetcher, weights, d, acc + d, padded);
    for (; d < dim; d += RUN_FEATURES<TYPE>, prefetcher.left++)
        if constexpr (ROUNDS_TO_BFLOAT16<TYPE>)
            accumulate_even_odd<TYPE, R, 1>(chunk, heads, prefetcher, weights, std::min(d, dim - RUN_FEATURES<TYPE>),
                                            acc + d, padded);
        else
            accumulate_in_order<TYPE, R, 1>(chunk, heads, prefetcher, weights, std::min(d, dim - RUN_FEATURES<TYPE>),
                                            acc + d, padded);
}

// Scores [R][CHUNK_TOKENS] of a chunk become weights; `acc` [R][padded], what was summed up so far, shrinks to fit.
// `scales`: of the keys and values at each place, if they have any.
template <int TYPE, int R>
INLINE void softmax(const Attention& op, const Chunk& chunk, const HeadScales<TYPE>& scales, float* scores, float* acc,
                    float* total, float* running_max) {
    const long first = chunk.first_vector(), end = chunk.end_vector();
    vf most[R];
    for (int r = 0; r < R; r++) most[r] = splat(running_max[r]);
    for (long i = first; i < end; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf score = scales.of_keys(load(scores + r * CHUNK_TOKENS + i), i);
            if (op.softcap > 0.0f) score = op.capped(score);
            score = chunk.masked(score, i);
            store(scores + r * CHUNK_TOKENS + i, score);
            most[r] = max(most[r], score);
        }
    vf sums[R] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) most[r] = splat(maximum(most[r]));
    for (long i = first; i < end; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vf weight = exp2(load(scores + r * CHUNK_TOKENS + i) - most[r]);
            sums[r] += weight;
            const vf factor = scales.of_values(weight, i);
            store(scores + r * CHUNK_TOKENS + i, ROUNDS_TO_BFLOAT16<TYPE> ? rounded_to_bfloat16(factor) : factor);
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const vf shrink = exp2(splat(running_max[r]) - most[r]);
        total[r] = fmadd(splat(total[r]), shrink, splat(sum(sums[r])))[0];
        if (most[r][0] > running_max[r])
            for (long d = 0; d < op.padded(); d += W)
                store(acc + r * op.padded() + d, load(acc + r * op.padded() + d) * shrink);
        running_max[r] = most[r][0];
    }
}

// Heads shorter than MIN_HEAD_DIM, each [dim] with zeros behind them.
template <int TYPE>
struct PaddedHeads {
    char keys[CHUNK_TOKENS][4 * W] = {}, values[CHUNK_TOKENS][4 * W] = {};
    long offsets[CHUNK_TOKENS];

    PaddedHeads(const HeadPointers& heads, long dim) {
        const auto bytes = static_cast<size_t>(dim * FEATURE_BYTES<TYPE>);
        for (long i = 0; i < CHUNK_TOKENS; i++) {
            std::memcpy(keys[i], heads.keys + heads.offsets[i], bytes);
            std::memcpy(values[i], heads.values + heads.offsets[i], bytes);
            offsets[i] = i * 4 * W;
        }
    }

    HeadPointers heads() const { return {keys[0], values[0], offsets}; }
};

// R queries against a chunk of one key/value head of `dim` features, or more with zeros.
template <int TYPE, int R>
void attend(const Attention& op, const Chunk& chunk, const HeadPointers& heads, const HeadScales<TYPE>& scales,
            long dim, const HeadPointers& next, const float* q, float* acc, float* total, float* running_max) {
    alignas(64) float weights[R * CHUNK_TOKENS];
    const long padded = op.padded();
    score<TYPE, R>(chunk, heads, next, q, dim, padded, weights);
    softmax<TYPE, R>(op, chunk, scales, weights, acc, total, running_max);
    accumulate<TYPE, R>(chunk, heads, next, head_bytes(TYPE, op.dim), weights, dim, acc, padded);
}

// All queries of a key/value head. `partial`: see `partial_size`; q [group][padded] is scaled.
template <int TYPE>
void attend_all(const Attention& op, const Chunk& chunk, const HeadPointers& heads, const HeadScales<TYPE>& scales,
                long dim, const HeadPointers& next, const float* q, float* partial) {
    const long padded = op.padded();
    float *total = partial + op.group() * padded, *running_max = total + op.group();
    for (long first = 0; first < op.group();
         first += MAX_QUERIES, q += MAX_QUERIES * padded, partial += MAX_QUERIES * padded) {
        const auto some = [&](auto count) {
            attend<TYPE, count>(op, chunk, heads, scales, dim, next, q, partial, total + first, running_max + first);
        };
        switch (std::min<long>(op.group() - first, MAX_QUERIES)) {
            case 4: some(std::integral_constant<int, 4>()); break;
            case 3: some(std::integral_constant<int, 3>()); break;
            case 2: some(std::integral_constant<int, 2>()); break;
            case 1: some(std::integral_constant<int, 1>()); break;
        }
    }
}

template <int TYPE>
void attend_group(const Attention& op, const Chunk& chunk, const HeadPointers& heads, const HeadPointers& next,
                  const float* q, float* partial) {
    const HeadScales<TYPE> scales(heads, chunk, op.dim);
    if (op.dim >= MIN_HEAD_DIM<TYPE>) return attend_all<TYPE>(op, chunk, heads, scales, op.dim, next, q, partial);
    const PaddedHeads<TYPE> copies(heads, op.dim);
    attend_all<TYPE>(op, chunk, copies.heads(), scales, MIN_HEAD_DIM<TYPE>, next, q, partial);
}

void attend_group(const Attention& op, const Chunk& chunk, const HeadPointers& heads, const HeadPointers& next,
                  const float* q, float* partial) {
    switch (op.type) {
        case FLOAT32: return attend_group<FLOAT32>(op, chunk, heads, next, q, partial);
        case BFLOAT16: return attend_group<BFLOAT16>(op, chunk, heads, next, q, partial);
        case INT8: return attend_group<INT8>(op, chunk, heads, next, q, partial);
    }
}

void scale_queries(const Attention& op, const float* from, long count, float* to) {
    const float scale = op.query_scale();
    for (long i = 0; i < count; i++, from += op.dim, to += op.padded()) {
        for (long d = 0; d < op.dim; d++) to[d] = from[d] * scale;
        std::fill(to + op.dim, to + op.padded(), 0.0f);
        if (ROUNDS_TO_BFLOAT16<BFLOAT16> && op.type == BFLOAT16)
            for (long d = 0; d < op.padded(); d += W) store(to + d, rounded_to_bfloat16(load(to + d)));
    }
}

// The sums of RUN_FEATURES features, times `one`, in the order of the features.
template <int TYPE>
void write_run(const float* sums, float one, long count, float* out) {
    alignas(64) float all[RUN_FEATURES<TYPE>];
    if constexpr (TYPE == BFLOAT16) {
        const vf even = load(sums) * splat(one), odd = load(sums + W) * splat(one);
        store(all, interleave<false>(even, odd));
        store(all + W, interleave<true>(even, odd));
    } else {
        store(all, load(sums) * splat(one));
    }
    std::copy(all, all + count, out);
}

template <int TYPE>
void write_sums(const float* sums, float one, long dim, float* out) {
    for (long d = 0; d < dim; d += RUN_FEATURES<TYPE>)
        if (dim < MIN_HEAD_DIM<TYPE>)
            write_run<TYPE>(sums + d, one, std::min<long>(RUN_FEATURES<TYPE>, dim - d), out + d);
        else
            write_run<TYPE>(sums + d, one, RUN_FEATURES<TYPE>, out + std::min(d, dim - RUN_FEATURES<TYPE>));
}

}  // namespace

void attend_decode(const Attention& op, const KvSplit& split, const KvSplit& after, float* partials) {
    static thread_local Scratch scratch;
    const long heads = split.kv_end - split.kv_head, group = op.group(), padded = op.padded(), size = partial_size(op);
    float* queries = scratch.floats(static_cast<size_t>(heads * group * padded));
    scale_queries(op, op.q + op.extents[3 * split.row] * op.q_stride + split.kv_head * group * op.dim, heads * group,
                  queries);
    for (long head = 0; head < heads; head++) {
        float* maxima = partials + head * size + group * (padded + 1);
        std::fill(partials + head * size, maxima, 0.0f);
        std::fill(maxima, maxima + group, INITIAL_MAX);
    }
    Chunk chunk(op, split.row, split.begin, split.end);
    while (true) {
        const long end = chunk.base + CHUNK_TOKENS;
        const bool last = end >= split.end;
        const Chunk next = last ? Chunk(op, after.row, after.begin, after.end) : Chunk(op, split.row, end, split.end);
        for (long head = 0; head < heads; head++) {
            const HeadPointers now(op, chunk, split.kv_head + head);
            const HeadPointers then = head + 1 < heads ? HeadPointers(op, chunk, split.kv_head + head + 1)
                                                       : HeadPointers(op, next, last ? after.kv_head : split.kv_head);
            attend_group(op, chunk, now, then, queries + head * group * padded, partials + head * size);
        }
        if (last) return;
        chunk = next;
    }
}

void write_sums(const Attention& op, const float* sums, float one, float* out) {
    switch (op.type) {
        case FLOAT32: return write_sums<FLOAT32>(sums, one, op.dim, out);
        case BFLOAT16: return write_sums<BFLOAT16>(sums, one, op.dim, out);
        case INT8: return write_sums<INT8>(sums, one, op.dim, out);
    }
}
