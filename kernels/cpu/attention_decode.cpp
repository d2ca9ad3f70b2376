// Attention of one token: the heads that share a key/value head are few, so a vector lies along tokens for scores and
// along head_dim for values. What is stored goes from memory to registers and nowhere else.
#include "scratch.h"
#include "stored.h"

namespace {

constexpr int MOST = 4;
// Queries at a time: what the registers hold.

// Some tokens of one key/value head: place i is at `keys` + offsets[i], and at `values` + offsets[i].
struct Heads {
    const char* keys;
    const char* values;
    const long* offsets;

    Heads(const Attention& op, const Chunk& chunk, long kv_head) : offsets(chunk.offsets) {
        const long head = kv_head * head_bytes(op.type, op.dim);
        keys = op.keys + head;
        values = op.values + head;
    }

    Heads(const char* keys, const char* values, const long* offsets) : keys(keys), values(values), offsets(offsets) {}
};

// Features that are loaded at once: shorter heads are copied with zeros behind them.
template <int TYPE>
constexpr int NARROW = std::max(WINDOW<TYPE>, RUN<TYPE>);

// What int8 heads at each place are multiplied with; other types have no such thing.
template <int TYPE>
struct Scales {
    alignas(64) float keys[TYPE == INT8 ? CHUNK : 1];
    alignas(64) float values[TYPE == INT8 ? CHUNK : 1];

    INLINE Scales(const Heads& heads, const Chunk& chunk, long dim) {
        if constexpr (TYPE == INT8)
            for (long i = chunk.first_vector(); i < chunk.end_vector(); i++) {
                std::memcpy(keys + i, heads.keys + heads.offsets[i] + dim, sizeof(float));
                std::memcpy(values + i, heads.values + heads.offsets[i] + dim, sizeof(float));
            }
    }

    INLINE vf of_keys(vf score, long at) const { return TYPE == INT8 ? score * load(keys + at) : score; }
    INLINE vf of_values(vf weight, long at) const { return TYPE == INT8 ? weight * load(values + at) : weight; }
};

// Asks for the lines from `from` on that begin within `bytes`, and that of the last byte.
INLINE void fetch(const char* from, long bytes) {
    for (long byte = 0; byte < bytes; byte += 4 * LINE) prefetch(from + byte);
    if (bytes % (4 * LINE) != 0) prefetch(from + bytes - 1);
}

// sum [G][R] plus features `skip` on of a window at `from`, times q [R][padded]. Keys are turned, so that a vector holds
// the same feature of W tokens.
template <int TYPE, int R, int G, bool WHOLE>
INLINE void score_window(const char* from, const long* offsets, const float* q, long padded, long skip,
                         vf (&sum)[G][R]) {
    vi turned[G][TURNED];
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) load_turned(from, offsets + g * W, turned[g]);
    if constexpr (WHOLE) {
#pragma GCC unroll 8
        for (int i = 0; i < TURNED; i++)
#pragma GCC unroll 4
            for (int p = 0; p < PACKED<TYPE>; p++)
#pragma GCC unroll 2
                for (int g = 0; g < G; g++) {
                    const vf key = unpacked<TYPE>(turned[g][i], p);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        sum[g][r] = fused(key, splat(q[r * padded + i * PACKED<TYPE> + p]), sum[g][r]);
                }
    } else {
        for (long k = skip; k < WINDOW<TYPE>; k++)
            for (int g = 0; g < G; g++) {
                const vf key = unpacked<TYPE>(turned[g][k / PACKED<TYPE>], static_cast<int>(k % PACKED<TYPE>));
                for (int r = 0; r < R; r++) sum[g][r] = fused(key, splat(q[r * padded + k]), sum[g][r]);
            }
    }
}

// The same for `ROUNDS`: products with features at even places are added to parts [G][R][0], others to [1].
template <int TYPE, int R, int G, bool WHOLE>
INLINE void score_parts(const char* from, const long* offsets, const float* q, long padded, long skip, long place,
                        vf (&parts)[G][R][2]) {
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
        vi turned[TURNED];
        load_turned(from, offsets + g * W, turned);
        if constexpr (WHOLE) {
#pragma GCC unroll 8
            for (int i = 0; i < TURNED; i++)
#pragma GCC unroll 2
                for (int p = 0; p < 2; p++) {
                    const vf key = unpacked<TYPE>(turned[i], p);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        parts[g][r][p] = fused(key, splat(q[r * padded + i * 2 + p]), parts[g][r][p]);
                }
        } else {
            for (long k = skip; k < WINDOW<TYPE>; k++) {
                const vf key = unpacked<TYPE>(turned[k / 2], static_cast<int>(k % 2));
                for (int r = 0; r < R; r++) {
                    vf& part = parts[g][r][(place + k) % 2];
                    part = fused(key, splat(q[r * padded + k]), part);
                }
            }
        }
    }
}

// Adds the sums of PRODUCTS features, and begins new ones.
template <int R, int G>
INLINE void add_parts(vf (&parts)[G][R][2], vf (&sum)[G][R]) {
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            sum[g][r] += parts[g][r][0] + parts[g][r][1];
            parts[g][r][0] = parts[g][r][1] = vf{};
        }
}

// scores [R][CHUNK] of G times W keys from place `at` on; q [R][padded] is scaled. Those of `next` will be needed soon.
template <int TYPE, int R, int G>
INLINE void score_some(const Heads& heads, const Heads& next, long at, const float* q, long dim, long padded,
                       float* scores) {
    const long* offsets = heads.offsets + at;
    vf sum[G][R] = {};
    [[maybe_unused]] vf parts[G][R][2] = {};
    long done = 0;
    for (; done + WINDOW<TYPE> <= dim; done += WINDOW<TYPE>) {
        for (long i = at + done * (G * W) / dim; i < at + (done + WINDOW<TYPE>) * (G * W) / dim; i++)
            fetch(next.keys + next.offsets[i], head_bytes(TYPE, dim));
        const char* from = heads.keys + done * BYTES<TYPE>;
        if constexpr (ROUNDS<TYPE>) {
            score_parts<TYPE, R, G, true>(from, offsets, q + done, padded, 0, done, parts);
            if ((done + WINDOW<TYPE>) % PRODUCTS == 0) add_parts<R, G>(parts, sum);
        } else {
            score_window<TYPE, R, G, true>(from, offsets, q + done, padded, 0, sum);
        }
    }
    if (done < dim) {
        // The last window ends where the head does, and some of it was done before.
        const long begin = dim - WINDOW<TYPE>;
        const char* from = heads.keys + begin * BYTES<TYPE>;
        if constexpr (ROUNDS<TYPE>)
            score_parts<TYPE, R, G, false>(from, offsets, q + begin, padded, done - begin, begin, parts);
        else
            score_window<TYPE, R, G, false>(from, offsets, q + begin, padded, done - begin, sum);
    }
    if constexpr (ROUNDS<TYPE>) add_parts<R, G>(parts, sum);
#pragma GCC unroll 2
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(scores + r * CHUNK + at + g * W, sum[g][r]);
}

template <int TYPE, int R>
INLINE void score(const Chunk& chunk, const Heads& heads, const Heads& next, const float* q, long dim, long padded,
                  float* scores) {
    long at = chunk.first_vector();
    // Two at a time, because sums wait for each other.
    for (; at + W < chunk.to; at += 2 * W) score_some<TYPE, R, 2>(heads, next, at, q, dim, padded, scores);
    if (at < chunk.to) score_some<TYPE, R, 1>(heads, next, at, q, dim, padded, scores);
    // Another chunk may have more tokens than this one.
    for (long i = chunk.end_vector(); i < CHUNK; i++) fetch(next.keys + next.offsets[i], head_bytes(TYPE, dim));
}

// sum [R] += N runs of one token's values times its weight for each query, which are CHUNK floats apart.
template <int TYPE, int R, int N, int V = RUN<TYPE> / W>
INLINE void add_values(const char* from, const float* weights, vf (&sum)[R][N * V]) {
    vf weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weight[r] = splat(weights[r * CHUNK]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        vf value[V];
        load_run<TYPE>(from + n * RUN<TYPE> * BYTES<TYPE>, value);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[r][n * V + v] = fused(weight[r], value[v], sum[r][n * V + v]);
    }
}

// Values of the next heads, asked for in passes through a chunk, in each those of every `passes`th token: so memory is
// busy all the time, and nothing waits for more lines than can be on their way.
struct Due {
    const Heads& heads;
    long bytes, passes, left;

    INLINE void step(long i) {
        if (--left > 0) return;
        fetch(heads.values + heads.offsets[i], bytes);
        left = passes;
    }
};

// acc [R][padded], N runs from feature `d` on, plus values times weights [R][CHUNK].
template <int TYPE, int R, int N>
INLINE void mix_some(const Chunk& chunk, const Heads& heads, Due due, const float* weights, long d, float* acc,
                     long padded) {
    constexpr int V = RUN<TYPE> / W;
    vf sum[R][N * V];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < N * V; v++) sum[r][v] = load(acc + r * padded + v * W);
    for (long i = chunk.from; i < chunk.to; i++) {
        const char* from = heads.values + heads.offsets[i] + d * BYTES<TYPE>;
        due.step(i);
        add_values<TYPE, R, N>(from, weights + i, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < N * V; v++) store(acc + r * padded + v * W, sum[r][v]);
}

// The same for `ROUNDS`: first the tokens at even places of each PRODUCTS, then those at odd ones.
template <int TYPE, int R, int N>
INLINE void mix_parts(const Chunk& chunk, const Heads& heads, Due due, const float* weights, long d, float* acc,
                      long padded) {
    constexpr int V = RUN<TYPE> / W;
    for (long half = chunk.from / PRODUCTS * PRODUCTS; half < chunk.to; half += PRODUCTS) {
        vf parts[2][R][N * V];
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < N * V; v++) parts[part][r][v] = vf{};
            const long begin = std::max(half, chunk.from), end = std::min<long>(half + PRODUCTS, chunk.to);
            for (long i = begin + ((begin ^ part) & 1); i < end; i += 2) {
                const char* from = heads.values + heads.offsets[i] + d * BYTES<TYPE>;
                due.step(i);
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
INLINE void mix(const Chunk& chunk, const Heads& heads, const Heads& next, long bytes, const float* weights, long dim,
                float* acc, long padded) {
    constexpr int N = (ROUNDS<TYPE> && R == MOST ? 2 : W == 16 ? 4 : 2) * W / RUN<TYPE>;
    for (long i = chunk.to; i < CHUNK; i++) fetch(next.values + next.offsets[i], bytes);
    Due due{next, bytes, (dim + N * RUN<TYPE> - 1) / (N * RUN<TYPE>), 1};
    long d = 0;
    for (; d + N * RUN<TYPE> <= dim; d += N * RUN<TYPE>, due.left++)
        if constexpr (ROUNDS<TYPE>)
            mix_parts<TYPE, R, N>(chunk, heads, due, weights, d, acc + d, padded);
        else
            mix_some<TYPE, R, N>(chunk, heads, due, weights, d, acc + d, padded);
    for (; d < dim; d += RUN<TYPE>, due.left++)
        if constexpr (ROUNDS<TYPE>)
            mix_parts<TYPE, R, 1>(chunk, heads, due, weights, std::min(d, dim - RUN<TYPE>), acc + d, padded);
        else
            mix_some<TYPE, R, 1>(chunk, heads, due, weights, std::min(d, dim - RUN<TYPE>), acc + d, padded);
}

// Scores [R][CHUNK] of a chunk become weights; `acc` [R][padded], what was summed up so far, shrinks to fit.
// `scales`: of the keys and values at each place, if they have any.
template <int TYPE, int R>
INLINE void soften(const Attention& op, const Chunk& chunk, const Scales<TYPE>& scales, float* scores, float* acc,
                   float* total, float* top) {
    const long first = chunk.first_vector(), end = chunk.end_vector();
    vf most[R];
    for (int r = 0; r < R; r++) most[r] = splat(top[r]);
    for (long i = first; i < end; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf score = scales.of_keys(load(scores + r * CHUNK + i), i);
            if (op.softcap > 0.0f) score = op.capped(score);
            score = chunk.seen(score, i);
            store(scores + r * CHUNK + i, score);
            most[r] = max(most[r], score);
        }
    vf sums[R] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) most[r] = splat(maximum(most[r]));
    for (long i = first; i < end; i += W)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vf weight = exp2(load(scores + r * CHUNK + i) - most[r]);
            sums[r] += weight;
            const vf factor = scales.of_values(weight, i);
            store(scores + r * CHUNK + i, ROUNDS<TYPE> ? rounded_to_bfloat16(factor) : factor);
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const vf shrink = exp2(splat(top[r]) - most[r]);
        total[r] = fused(splat(total[r]), shrink, splat(sum(sums[r])))[0];
        if (most[r][0] > top[r])
            for (long d = 0; d < op.padded(); d += W) store(acc + r * op.padded() + d, load(acc + r * op.padded() + d) * shrink);
        top[r] = most[r][0];
    }
}

// Heads shorter than NARROW, each [dim] with zeros behind them.
template <int TYPE>
struct Copies {
    char keys[CHUNK][4 * W] = {}, values[CHUNK][4 * W] = {};
    long offsets[CHUNK];

    Copies(const Heads& heads, long dim) {
        const auto bytes = static_cast<size_t>(dim * BYTES<TYPE>);
        for (long i = 0; i < CHUNK; i++) {
            std::memcpy(keys[i], heads.keys + heads.offsets[i], bytes);
            std::memcpy(values[i], heads.values + heads.offsets[i], bytes);
            offsets[i] = i * 4 * W;
        }
    }

    Heads heads() const { return {keys[0], values[0], offsets}; }
};

// R queries against a chunk of one key/value head of `dim` features, or more with zeros.
template <int TYPE, int R>
void attend(const Attention& op, const Chunk& chunk, const Heads& heads, const Scales<TYPE>& scales, long dim,
            const Heads& next, const float* q, float* acc, float* total, float* top) {
    alignas(64) float weights[R * CHUNK];
    const long padded = op.padded();
    score<TYPE, R>(chunk, heads, next, q, dim, padded, weights);
    soften<TYPE, R>(op, chunk, scales, weights, acc, total, top);
    mix<TYPE, R>(chunk, heads, next, head_bytes(TYPE, op.dim), weights, dim, acc, padded);
}

// All queries of a key/value head. `partial`: see `partial_size`; q [group][padded] is scaled.
template <int TYPE>
void attend_all(const Attention& op, const Chunk& chunk, const Heads& heads, const Scales<TYPE>& scales, long dim,
                const Heads& next, const float* q, float* partial) {
    const long padded = op.padded();
    float *total = partial + op.group() * padded, *top = total + op.group();
    for (long first = 0; first < op.group(); first += MOST, q += MOST * padded, partial += MOST * padded) {
        const auto some = [&](auto count) {
            attend<TYPE, count>(op, chunk, heads, scales, dim, next, q, partial, total + first, top + first);
        };
        switch (std::min<long>(op.group() - first, MOST)) {
            case 4: some(std::integral_constant<int, 4>()); break;
            case 3: some(std::integral_constant<int, 3>()); break;
            case 2: some(std::integral_constant<int, 2>()); break;
            case 1: some(std::integral_constant<int, 1>()); break;
        }
    }
}

template <int TYPE>
void attend_group(const Attention& op, const Chunk& chunk, const Heads& heads, const Heads& next, const float* q,
                  float* partial) {
    const Scales<TYPE> scales(heads, chunk, op.dim);
    if (op.dim >= NARROW<TYPE>) return attend_all<TYPE>(op, chunk, heads, scales, op.dim, next, q, partial);
    const Copies<TYPE> copies(heads, op.dim);
    attend_all<TYPE>(op, chunk, copies.heads(), scales, NARROW<TYPE>, next, q, partial);
}

void attend_group(const Attention& op, const Chunk& chunk, const Heads& heads, const Heads& next, const float* q,
                  float* partial) {
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
        if (ROUNDS<BFLOAT16> && op.type == BFLOAT16)
            for (long d = 0; d < op.padded(); d += W) store(to + d, rounded_to_bfloat16(load(to + d)));
    }
}

// The sums of RUN features, times `one`, in the order of the features.
template <int TYPE>
void write_run(const float* sums, float one, long count, float* out) {
    alignas(64) float all[RUN<TYPE>];
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
    for (long d = 0; d < dim; d += RUN<TYPE>)
        if (dim < NARROW<TYPE>)
            write_run<TYPE>(sums + d, one, std::min<long>(RUN<TYPE>, dim - d), out + d);
        else
            write_run<TYPE>(sums + d, one, RUN<TYPE>, out + std::min(d, dim - RUN<TYPE>));
}

}  // namespace

void attend_one(const Attention& op, const Part& part, const Part& after, float* partials) {
    static thread_local Scratch scratch;
    const long heads = part.kv_end - part.kv_head, group = op.group(), padded = op.padded(), size = partial_size(op);
    float* queries = scratch.floats(static_cast<size_t>(heads * group * padded));
    scale_queries(op, op.q + op.extents[3 * part.row] * op.q_stride + part.kv_head * group * op.dim, heads * group,
                  queries);
    for (long head = 0; head < heads; head++) {
        float* tops = partials + head * size + group * (padded + 1);
        std::fill(partials + head * size, tops, 0.0f);
        std::fill(tops, tops + group, LOWEST);
    }
    Chunk chunk(op, part.row, part.begin, part.end);
    while (true) {
        const long end = chunk.base + CHUNK;
        const bool last = end >= part.end;
        const Chunk next = last ? Chunk(op, after.row, after.begin, after.end) : Chunk(op, part.row, end, part.end);
        for (long head = 0; head < heads; head++) {
            const Heads now(op, chunk, part.kv_head + head);
            const Heads then = head + 1 < heads ? Heads(op, chunk, part.kv_head + head + 1)
                                                : Heads(op, next, last ? after.kv_head : part.kv_head);
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
