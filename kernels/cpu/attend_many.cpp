// Attention of many tokens of one row: a vector lies along the queries, which are pairs of position and head.
#include "attention.h"
#include "scratch.h"

namespace {

constexpr int MV = 3;
// Vectors of queries. Three: groups of three heads fill them, and there are registers for them.
constexpr int LANES = MV * W;
constexpr int TILE = W == 16 ? 8 : 4;
// Keys, or features of values, that are multiplied with the queries at a time.

// sum [N][MV] over `count` steps: in step i panel [count][LANES] times factor(i, n).
template <int N, typename Factor>
INLINE void multiply(const float* panel, long count, vf (&sum)[N][MV], Factor&& factor) {
    for (long i = 0; i < count; i++) {
        vf x[MV];
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) x[m] = load(panel + (i * MV + m) * W);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const vf one = splat(factor(i, n));
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) sum[n][m] += one * x[m];
        }
    }
}

// scores [CHUNK][LANES] of the chunk's keys, and of some around them that mean nothing.
void score(const Chunk& chunk, const Rows& keys, const float* queries, long dim, float* scores) {
    for (long token = chunk.from / TILE * TILE; token < chunk.to; token += TILE) {
        const float* rows[TILE];
        std::copy(keys.at + token, keys.at + token + TILE, rows);
        vf sum[TILE][MV] = {};
        multiply<TILE>(queries, dim, sum, [&](long i, int n) INLINE_LAMBDA { return rows[n][i]; });
#pragma GCC unroll 8
        for (int n = 0; n < TILE; n++)
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) store(scores + ((token + n) * MV + m) * W, sum[n][m]);
    }
}

// acc [dim][LANES], N features from `d` on, plus the values times weights [CHUNK][LANES].
template <int N>
INLINE void mix_tile(const Chunk& chunk, const Rows& values, const float* weights, long d, float* acc) {
    vf sum[N][MV];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) sum[n][m] = load(acc + ((d + n) * MV + m) * W);
    const float* const* rows = values.at + chunk.from;
    multiply<N>(weights + chunk.from * LANES, chunk.to - chunk.from, sum,
                [&](long i, int n) INLINE_LAMBDA { return rows[i][d + n]; });
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) store(acc + ((d + n) * MV + m) * W, sum[n][m]);
}

void mix(const Chunk& chunk, const Rows& values, const float* weights, long dim, float* acc) {
    long d = 0;
    for (; d + TILE <= dim; d += TILE) mix_tile<TILE>(chunk, values, weights, d, acc);
    for (; d < dim; d++) mix_tile<1>(chunk, values, weights, d, acc);
}

// The places in the sequence that each query sees.
struct Seen {
    vf first[MV], last[MV];
    long all_from, all_to;  // what every one of them sees

    void hide(const Chunk& chunk, float* scores) const {
        if (chunk.base + chunk.from >= all_from && chunk.base + chunk.to <= all_to) return;
        for (long i = chunk.from; i < chunk.to; i++) {
            const vf place = splat(static_cast<float>(chunk.base + i));
            for (int m = 0; m < MV; m++) {
                float* at = scores + (i * MV + m) * W;
                const vf score = load(at);
                const vf early = last[m] >= place ? score : splat(UNSEEN);
                store(at, first[m] <= place ? early : splat(UNSEEN));
            }
        }
    }
};

// What online softmax knows of each query, and the sum of values [dim][LANES] that belongs to it.
struct Sums {
    vf total[MV], top[MV];
    float* acc;

    void clear(long dim) {
        for (int m = 0; m < MV; m++) {
            total[m] = vf{};
            top[m] = splat(LOWEST);
        }
        std::fill(acc, acc + dim * LANES, 0.0f);
    }

    // The chunk's scores become weights; what was summed up so far shrinks to fit.
    void soften(const Chunk& chunk, long dim, float* scores) {
        for (int m = 0; m < MV; m++) {
            vf highest = top[m];
            for (long i = chunk.from; i < chunk.to; i++) highest = max(highest, load(scores + (i * MV + m) * W));
            const vf shrink = exp2(top[m] - highest);
            vf sums[W] = {};
            for (long i = chunk.from; i < chunk.to; i++) {
                float* at = scores + (i * MV + m) * W;
                const vf weight = exp2(load(at) - highest);
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

    void add_part(const Sums& part, long dim) {
        for (int m = 0; m < MV; m++) {
            vf keep, add;
            merge(top[m], total[m], part.top[m], part.total[m], keep, add);
            for (long d = 0; d < dim; d++) {
                float* at = acc + (d * MV + m) * W;
                store(at, fused(add, load(part.acc + (d * MV + m) * W), keep * load(at)));
            }
        }
    }
};

// Up to LANES queries of one key/value head: lanes `done` to done + some of the positions from `first` on.
struct Queries {
    const Attention& op;
    long row, kv_head, first, done, some;

    long position(long lane) const { return first + (done + lane) / op.group(); }
    long head(long lane) const { return kv_head * op.group() + (done + lane) % op.group(); }
    long token(long lane) const { return op.extents[3 * row] + position(lane); }
    // Its place in the sequence; beyond the end that of the last.
    long place(long lane) const { return op.extents[3 * row + 2] + position(std::min(lane, some - 1)); }

    void pack(float* queries) const {
        std::fill(queries, queries + op.dim * LANES, 0.0f);
        const float scale = op.query_scale();
        for (long lane = 0; lane < some; lane++) {
            const float* q = op.q + token(lane) * op.q_stride + head(lane) * op.dim;
            for (long d = 0; d < op.dim; d++) queries[d * LANES + lane] = q[d] * scale;
        }
    }

    Seen seen() const {
        float firsts[LANES], lasts[LANES];
        for (long lane = 0; lane < LANES; lane++) {
            firsts[lane] = static_cast<float>(op.first_seen(place(lane)));
            lasts[lane] = static_cast<float>(place(lane));
        }
        Seen seen;
        for (int m = 0; m < MV; m++) {
            seen.first[m] = load(firsts + m * W);
            seen.last[m] = load(lasts + m * W);
        }
        seen.all_from = op.first_seen(place(some - 1));
        seen.all_to = place(0) + 1;
        return seen;
    }

    void write(const Sums& sums) const {
        for (long lane = 0; lane < some; lane++) {
            const float one = 1.0f / sums.total[lane / W][lane % W];
            float* out = op.out + (token(lane) * op.heads + head(lane)) * op.dim;
            for (long d = 0; d < op.dim; d++) out[d] = sums.acc[d * LANES + lane] * one;
        }
    }
};

void attend(const Queries& from, Scratch& scratch) {
    const Attention& op = from.op;
    const long size = op.dim * LANES;
    float* queries = scratch.floats(static_cast<size_t>(3 * size + CHUNK * (LANES + op.dim)));
    float* scores = queries + size;
    float* widened = scores + CHUNK * LANES;
    Sums whole, part;
    whole.acc = widened + CHUNK * op.dim;
    part.acc = whole.acc + size;
    from.pack(queries);
    const Seen seen = from.seen();
    const long begin = op.first_seen(from.place(0)), end = from.place(from.some - 1) + 1;
    Sums* sums = &whole;
    whole.clear(op.dim);
    for (long token = begin; token < end; token += CHUNK - token % CHUNK) {
        if (token % PART == 0 && token > begin) {
            if (sums == &part) whole.add_part(part, op.dim);
            sums = &part;
            part.clear(op.dim);
        }
        const Chunk chunk(op, from.row, token, end);
        Rows keys(op, chunk, op.keys, from.kv_head), values(op, chunk, op.values, from.kv_head);
        keys.widen(op, chunk, widened);
        score(chunk, keys, queries, op.dim, scores);
        if (op.softcap > 0.0f)
            for (long i = chunk.from * LANES; i < chunk.to * LANES; i += W) store(scores + i, op.capped(load(scores + i)));
        seen.hide(chunk, scores);
        sums->soften(chunk, op.dim, scores);
        values.widen(op, chunk, widened);
        mix(chunk, values, scores, op.dim, sums->acc);
    }
    if (sums == &part) whole.add_part(part, op.dim);
    from.write(whole);
}

}  // namespace

long positions_at_once(const Attention& op) { return std::max(1L, LANES / op.group()); }

void attend_many(const Attention& op, long row, long first, long count, long kv_head) {
    static thread_local Scratch scratch;
    const long lanes = count * op.group();
    // More heads than lanes share a key/value head in few models: then a part of them at a time.
    for (long done = 0; done < lanes; done += LANES)
        attend({op, row, kv_head, first, done, std::min<long>(LANES, lanes - done)}, scratch);
}
