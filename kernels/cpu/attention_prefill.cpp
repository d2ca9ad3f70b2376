// Attention of many tokens of one row: a vector lies along the queries, which are pairs of position and head.
#include <vector>

#include "attend_bfloat16.h"
#include "attend_wide.h"
#include "scratch.h"

namespace {

// The places in the sequence that each query sees.
struct Seen {
    vf first[MV], last[MV];
    long all_from, all_to;  // what every one of them sees

    void hide(const Span& span, float* scores) const {
        if (span.base + span.from >= all_from && span.base + span.to <= all_to) return;
        for (long i = span.from; i < span.to; i++) {
            const vf place = splat(static_cast<float>(span.base + i));
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

    // The span's scores become weights, times `scales` if there are any; what was summed up so far is to be multiplied
    // with `shrink`.
    void soften(const Span& span, const float* scales, float* scores, vf (&shrink)[MV]) {
        vf highest[MV];
        std::copy(top, top + MV, highest);
        for (long i = span.from; i < span.to; i++)
            for (int m = 0; m < MV; m++) highest[m] = max(highest[m], load(scores + (i * MV + m) * W));
        vf sums[W][MV] = {};
        for (int lane = 0; lane < W; lane++)
            for (long i = lane; i < CHUNK; i += W) {
                if (i < span.from || i >= span.to) continue;
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) {
                    float* at = scores + (i * MV + m) * W;
                    const vf weight = exp2(load(at) - highest[m]);
                    sums[lane][m] += weight;
                    store(at, scales ? weight * splat(scales[i]) : weight);
                }
            }
        for (int m = 0; m < MV; m++) {
            for (int step = W / 2; step > 0; step /= 2)  // as `sum` adds the lanes of a vector
                for (int i = 0; i < step; i++) sums[i][m] += sums[i + step][m];
            shrink[m] = exp2(top[m] - highest[m]);
            total[m] = fused(total[m], shrink[m], sums[0][m]);
            top[m] = highest[m];
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
        long offsets[LANES];
        for (long lane = 0; lane < LANES; lane++) {
            const long taken = std::min(lane, some - 1);  // what the lanes behind these hold does not matter
            offsets[lane] = (token(taken) * op.q_stride + head(taken) * op.dim) * static_cast<long>(sizeof(float));
        }
        const auto* from = reinterpret_cast<const char*>(op.q);
        const vf scale = splat(op.query_scale());
        for (int m = 0; m < MV; m++) {
            long d = 0;
            for (; d + TURNED <= op.dim; d += TURNED) {
                vi turned[TURNED];
                load_turned(from + d * 4, offsets + m * W, turned);
                for (int i = 0; i < TURNED; i++) store(queries + ((d + i) * MV + m) * W, bits(turned[i]) * scale);
            }
            for (; d < op.dim; d++)
                for (int i = 0; i < W; i++) {
                    float one;
                    std::memcpy(&one, from + offsets[m * W + i] + d * 4, sizeof one);
                    queries[(d * MV + m) * W + i] = one * scale[0];
                }
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
        float* to[LANES];
        for (long lane = 0; lane < some; lane++) to[lane] = op.out + (token(lane) * op.heads + head(lane)) * op.dim;
        for (int m = 0; m < MV; m++) {
            const vf one = splat(1.0f) / sums.total[m];
            const long lanes = std::clamp<long>(some - m * W, 0, W);
            long d = 0;
            for (; d + W <= op.dim; d += W) {
                vf rows[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) rows[i] = load(sums.acc + ((d + i) * MV + m) * W) * one;
                transpose(rows);
                for (long i = 0; i < lanes; i++) store(to[m * W + i] + d, rows[i]);
            }
            for (; d < op.dim; d++)
                for (long i = 0; i < lanes; i++) to[m * W + i][d] = sums.acc[(d * MV + m) * W + i] * one[i];
        }
    }
};

// What is known of some queries while chunk after chunk is seen.
struct Tile {
    Queries from;
    Seen seen;
    long begin, end;  // the tokens that one of them sees at least
    long width;       // of features there is memory for
    float* queries;   // [width][LANES]
    Sums whole, part;
    bool parted = false;

    // Floats for `width` features.
    static long memory(long width) { return 3 * width * LANES; }

    Tile(const Queries& queries_of, long width, float* memory)
        : from(queries_of), seen(from.seen()), width(width), queries(memory) {
        const Attention& op = from.op;
        begin = op.first_seen(from.place(0));
        end = from.place(from.some - 1) + 1;
        whole.acc = memory + width * LANES;
        part.acc = whole.acc + width * LANES;
        whole.clear(width);
        from.pack(queries);
    }

    template <typename Stored>
    void attend(const Chunk& chunk, const Stored& stored, float* scores) {
        const Attention& op = from.op;
        const Span span{chunk.base, std::max(chunk.from, begin - chunk.base), std::min(chunk.to, end - chunk.base)};
        if (span.from >= span.to) return;
        if (span.base % PART == 0 && span.base > begin) {
            if (parted) whole.add_part(part, op.dim);
            parted = true;
            part.clear(width);
        }
        score(span, stored, queries, op, scores);
        if (op.softcap > 0.0f)
            for (long i = span.from * LANES; i < span.to * LANES; i += W) store(scores + i, op.capped(load(scores + i)));
        seen.hide(span, scores);
        Sums& sums = parted ? part : whole;
        vf shrink[MV];
        sums.soften(span, stored.scales(op), scores, shrink);
        mix(span, stored, scores, shrink, op.dim, sums.acc);
    }

    void write() {
        if (parted) whole.add_part(part, from.op.dim);
        from.write(whole);
    }
};

// Tiles of consecutive queries, so that what is widened is widened once for all of them.
template <typename Stored>
void attend(const Queries& all, Scratch& scratch) {
    const Attention& op = all.op;
    const long count = (all.some + LANES - 1) / LANES, width = Stored::width(op), size = Tile::memory(width);
    float* scores = scratch.floats(static_cast<size_t>(CHUNK * LANES + Stored::memory(op) + count * size));
    float* filled = scores + CHUNK * LANES;
    std::vector<Tile> tiles;
    tiles.reserve(static_cast<size_t>(count));
    for (long done = 0; done < all.some; done += LANES) {
        const Queries some{op, all.row, all.kv_head, all.first, all.done + done, std::min<long>(LANES, all.some - done)};
        tiles.emplace_back(some, width, filled + Stored::memory(op) + done / LANES * size);
        Stored::prepare(op, tiles.back().queries);
    }
    const long end = tiles.back().end;
    Stored stored;
    [[maybe_unused]] const typename Stored::Session session;
    for (long token = tiles.front().begin; token < end; token += CHUNK - token % CHUNK) {
        const Chunk chunk(op, all.row, token, end);
        stored.fill(op, chunk, all.kv_head, filled);
        for (Tile& tile : tiles) tile.attend(chunk, stored, scores);
    }
    for (Tile& tile : tiles) tile.write();
}

}  // namespace

long positions_at_once(const Attention& op, long tiles) { return std::max(1L, tiles * LANES / op.group()); }

void attend_many(const Attention& op, long row, long first, long count, long kv_head) {
    static thread_local Scratch scratch;
    // More heads than lanes share a key/value head in few models: then they are in several tiles.
    const Queries queries{op, row, kv_head, first, 0, count * op.group()};
#if defined(HAS_AMX)
    if (op.type == BFLOAT16) return attend<Bfloat16>(queries, scratch);
#endif
    attend<Wide>(queries, scratch);
}
