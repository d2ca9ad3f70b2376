// Attention of many tokens of one row: a vector lies along the queries, which are pairs of position and head.
#include <vector>

#include "prefill_chunks.h"
#include "scratch.h"

namespace {

// The places in the sequence that each query attends to.
struct VisibleRange {
    vf first[QUERY_VECTORS], last[QUERY_VECTORS];
    long all_from, all_to;  // what every one of them attends to

    void hide(const VisibleSpan& span, float* scores) const {
        if (span.base + span.from >= all_from && span.base + span.to <= all_to) return;
        for (long i = span.from; i < span.to; i++) {
            const vf place = splat(static_cast<float>(span.base + i));
            for (int m = 0; m < QUERY_VECTORS; m++) {
                float* at = scores + (i * QUERY_VECTORS + m) * W;
                const vf score = load(at);
                const vf early = last[m] >= place ? score : splat(MASKED_SCORE);
                store(at, first[m] <= place ? early : splat(MASKED_SCORE));
            }
        }
    }
};

// State of online softmax for each query (the running sum and maximum), and the sum of values [dim][QUERY_LANES] that
// belongs to it.
struct OnlineSoftmax {
    vf total[QUERY_VECTORS], running_max[QUERY_VECTORS];
    float* acc;

    void clear(long dim) {
        for (int m = 0; m < QUERY_VECTORS; m++) {
            total[m] = vf{};
            running_max[m] = splat(INITIAL_MAX);
        }
        std::fill(acc, acc + dim * QUERY_LANES, 0.0f);
    }

    // The span's scores become weights, times `scales` if there are any; what was summed up so far is to be multiplied
    // with `shrink`.
    void softmax(const VisibleSpan& span, const float* scales, float* scores, vf (&shrink)[QUERY_VECTORS]) {
        vf highest[QUERY_VECTORS];
        std::copy(running_max, running_max + QUERY_VECTORS, highest);
        for (long i = span.from; i < span.to; i++)
            for (int m = 0; m < QUERY_VECTORS; m++)
                highest[m] = max(highest[m], load(scores + (i * QUERY_VECTORS + m) * W));
        vf sums[W][QUERY_VECTORS] = {};
        for (int lane = 0; lane < W; lane++)
            for (long i = lane; i < CHUNK_TOKENS; i += W) {
                if (i < span.from || i >= span.to) continue;
#pragma GCC unroll 4
                for (int m = 0; m < QUERY_VECTORS; m++) {
                    float* at = scores + (i * QUERY_VECTORS + m) * W;
                    const vf weight = exp2(load(at) - highest[m]);
                    sums[lane][m] += weight;
                    store(at, scales ? weight * splat(scales[i]) : weight);
                }
            }
        for (int m = 0; m < QUERY_VECTORS; m++) {
            for (int step = W / 2; step > 0; step /= 2)  // as `sum` adds the lanes of a vector
                for (int i = 0; i < step; i++) sums[i][m] += sums[i + step][m];
            shrink[m] = exp2(running_max[m] - highest[m]);
            total[m] = fmadd(total[m], shrink[m], sums[0][m]);
            running_max[m] = highest[m];
        }
    }

    void add_part(const OnlineSoftmax& part, long dim) {
        for (int m = 0; m < QUERY_VECTORS; m++) {
            vf keep, add;
            merge_softmax(running_max[m], total[m], part.running_max[m], part.total[m], keep, add);
            for (long d = 0; d < dim; d++) {
                float* at = acc + (d * QUERY_VECTORS + m) * W;
                store(at, fmadd(add, load(part.acc + (d * QUERY_VECTORS + m) * W), keep * load(at)));
            }
        }
    }
};

// Up to QUERY_LANES queries of one key/value head: lanes `done` to done + some of the positions from `first` on.
struct QueryRows {
    const Attention& op;
    long row, kv_head, first, done, some;

    long position(long lane) const { return first + (done + lane) / op.group(); }
    long head(long lane) const { return kv_head * op.group() + (done + lane) % op.group(); }
    long token(long lane) const { return op.extents[3 * row] + position(lane); }
    // Its place in the sequence; beyond the end that of the last.
    long place(long lane) const { return op.extents[3 * row + 2] + position(std::min(lane, some - 1)); }

    void pack(float* queries) const {
        long offsets[QUERY_LANES];
        for (long lane = 0; lane < QUERY_LANES; lane++) {
            const long taken = std::min(lane, some - 1);  // what the lanes behind these hold does not matter
            offsets[lane] = (token(taken) * op.q_stride + head(taken) * op.dim) * static_cast<long>(sizeof(float));
        }
        const auto* from = reinterpret_cast<const char*>(op.q);
        const vf scale = splat(op.query_scale());
        for (int m = 0; m < QUERY_VECTORS; m++) {
            long d = 0;
            for (; d + TRANSPOSED <= op.dim; d += TRANSPOSED) {
                vi transposed[TRANSPOSED];
                load_transposed(from + d * 4, offsets + m * W, transposed);
                for (int i = 0; i < TRANSPOSED; i++)
                    store(queries + ((d + i) * QUERY_VECTORS + m) * W, bits(transposed[i]) * scale);
            }
            for (; d < op.dim; d++)
                for (int i = 0; i < W; i++) {
                    float one;
                    std::memcpy(&one, from + offsets[m * W + i] + d * 4, sizeof one);
                    queries[(d * QUERY_VECTORS + m) * W + i] = one * scale[0];
                }
        }
    }

    VisibleRange visible() const {
        float firsts[QUERY_LANES], lasts[QUERY_LANES];
        for (long lane = 0; lane < QUERY_LANES; lane++) {
            firsts[lane] = static_cast<float>(op.first_visible(place(lane)));
            lasts[lane] = static_cast<float>(place(lane));
        }
        VisibleRange visible;
        for (int m = 0; m < QUERY_VECTORS; m++) {
            visible.first[m] = load(firsts + m * W);
            visible.last[m] = load(lasts + m * W);
        }
        visible.all_from = op.first_visible(place(some - 1));
        visible.all_to = place(0) + 1;
        return visible;
    }

    void write(const OnlineSoftmax& sums) const {
        float* to[QUERY_LANES];
        for (long lane = 0; lane < some; lane++) to[lane] = op.out + (token(lane) * op.heads + head(lane)) * op.dim;
        for (int m = 0; m < QUERY_VECTORS; m++) {
            const vf one = splat(1.0f) / sums.total[m];
            const long lanes = std::clamp<long>(some - m * W, 0, W);
            long d = 0;
            for (; d + W <= op.dim; d += W) {
                vf rows[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) rows[i] = load(sums.acc + ((d + i) * QUERY_VECTORS + m) * W) * one;
                transpose(rows);
                for (long i = 0; i < lanes; i++) store(to[m * W + i] + d, rows[i]);
            }
            for (; d < op.dim; d++)
                for (long i = 0; i < lanes; i++) to[m * W + i][d] = sums.acc[(d * QUERY_VECTORS + m) * W + i] * one[i];
        }
    }
};

// State of some queries while they are multiplied with chunk after chunk.
struct QueryTile {
    QueryRows from;
    VisibleRange visible;
    long begin, end;  // the tokens that at least one of them attends to
    long width;       // of features there is memory for
    float* queries;   // [width][QUERY_LANES]
    OnlineSoftmax whole, part;
    bool parted = false;

    // Floats for `width` features.
    static long memory(long width) { return 3 * width * QUERY_LANES; }

    QueryTile(const QueryRows& queries_of, long width, float* memory)
        : from(queries_of), visible(from.visible()), width(width), queries(memory) {
        const Attention& op = from.op;
        begin = op.first_visible(from.place(0));
        end = from.place(from.some - 1) + 1;
        whole.acc = memory + width * QUERY_LANES;
        part.acc = whole.acc + width * QUERY_LANES;
        whole.clear(width);
        from.pack(queries);
    }

    template <typename StoredChunk>
    void attend(const Chunk& chunk, const StoredChunk& stored, float* scores) {
        const Attention& op = from.op;
        const VisibleSpan span{chunk.base, std::max(chunk.from, begin - chunk.base),
                               std::min(chunk.to, end - chunk.base)};
        if (span.from >= span.to) return;
        if (span.base % SPLIT_TOKENS == 0 && span.base > begin) {
            if (parted) whole.add_part(part, op.dim);
            parted = true;
            part.clear(width);
        }
        score(span, stored, queries, op, scores);
        if (op.softcap > 0.0f)
            for (long i = span.from * QUERY_LANES; i < span.to * QUERY_LANES; i += W)
                store(scores + i, op.capped(load(scores + i)));
        visible.hide(span, scores);
        OnlineSoftmax& sums = parted ? part : whole;
        vf shrink[QUERY_VECTORS];
        sums.softmax(span, stored.scales(op), scores, shrink);
        accumulate(span, stored, scores, shrink, op.dim, sums.acc);
    }

    void write() {
        if (parted) whole.add_part(part, from.op.dim);
        from.write(whole);
    }
};

// Tiles of consecutive queries, so that a chunk is widened once for all of them.
template <typename StoredChunk>
void attend(const QueryRows& all, Scratch& scratch) {
    const Attention& op = all.op;
    const long count = (all.some + QUERY_LANES - 1) / QUERY_LANES, width = StoredChunk::width(op),
               size = QueryTile::memory(width);
    float* scores =
        scratch.floats(static_cast<size_t>(CHUNK_TOKENS * QUERY_LANES + StoredChunk::memory(op) + count * size));
    float* filled = scores + CHUNK_TOKENS * QUERY_LANES;
    std::vector<QueryTile> tiles;
    tiles.reserve(static_cast<size_t>(count));
    for (long done = 0; done < all.some; done += QUERY_LANES) {
        const QueryRows some{op,        all.row,         all.kv_head,
                             all.first, all.done + done, std::min<long>(QUERY_LANES, all.some - done)};
        tiles.emplace_back(some, width, filled + StoredChunk::memory(op) + done / QUERY_LANES * size);
        StoredChunk::prepare(op, tiles.back().queries);
    }
    const long end = tiles.back().end;
    StoredChunk stored;
    [[maybe_unused]] const typename StoredChunk::Session session;
    for (long token = tiles.front().begin; token < end; token += CHUNK_TOKENS - token % CHUNK_TOKENS) {
        const Chunk chunk(op, all.row, token, end);
        stored.fill(op, chunk, all.kv_head, filled);
        for (QueryTile& tile : tiles) tile.attend(chunk, stored, scores);
    }
    for (QueryTile& tile : tiles) tile.write();
}

}  // namespace

long positions_at_once(const Attention& op, long tiles) { return std::max(1L, tiles * QUERY_LANES / op.group()); }

void attend_prefill(const Attention& op, long row, long first, long count, long kv_head) {
    static thread_local Scratch scratch;
    // More heads than lanes share a key/value head in few models: then they are in several tiles.
    const QueryRows queries{op, row, kv_head, first, 0, count * op.group()};
#if defined(HAS_AMX)
    if (op.type == BFLOAT16) return attend<Bfloat16Chunk>(queries, scratch);
#endif
    attend<WidenedChunk>(queries, scratch);
}
