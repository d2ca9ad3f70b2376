// Queries side by side in vectors, and which of a chunk's tokens they are multiplied with.
//
// A chunk of one key/value head has a type of its own for each way to multiply it (`StoredChunk` in
// `attention_prefill.cpp`):
//   struct Session                                  that a thread has while it multiplies
//   static long width(op)                           features that queries and sums have room for
//   static void prepare(op, float* queries)         [dim][QUERY_LANES] as `score` takes them, in place
//   static long memory(op)                          floats that `fill` needs
//   void fill(op, chunk, kv_head, float* memory)
//   const float* scales(op)                         of the values at each place, or null
// and two functions:
//   score(span, stored, queries, op, scores)        scores [CHUNK_TOKENS][QUERY_LANES] of the span's keys, and of some
//   around them
//                                                   that mean nothing
//   accumulate(span, stored, weights, shrink, dim, acc)    acc [width][QUERY_LANES] times `shrink`, plus the values
//   times weights
//                                                   [CHUNK_TOKENS][QUERY_LANES], which may be overwritten
#pragma once

#include "attention.h"
#include "kv_cache.h"

// Vectors of queries that are multiplied at once. Three: groups of three heads fill them, and there are registers for
// them.
constexpr int QUERY_VECTORS = 3;
constexpr int QUERY_LANES = QUERY_VECTORS * W;

// Places `from` to `to` of a chunk, those that some of the queries attend to.
struct VisibleSpan {
    long base, from, to;
};

// ---- Chunks as floats, multiplied in vectors: for every type of cache, on every instruction set.

// Keys, or features of values, that are multiplied with the queries at a time: registers hold their sums.
constexpr int KEYS_AT_ONCE = W == 16 ? 8 : 4;

// sum [N][QUERY_VECTORS] over `count` steps: in step i panel [count][QUERY_LANES] times factor(i, n).
template <int N, typename Factor>
INLINE void multiply(const float* panel, long count, vf (&sum)[N][QUERY_VECTORS], Factor&& factor) {
    // Unrolled, the loop is short enough for its end to be foreseen.
#pragma GCC unroll 4
    for (long i = 0; i < count; i++) {
        vf x[QUERY_VECTORS];
#pragma GCC unroll 4
        for (int m = 0; m < QUERY_VECTORS; m++) x[m] = load(panel + (i * QUERY_VECTORS + m) * W);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const vf one = splat(factor(i, n));
#pragma GCC unroll 4
            for (int m = 0; m < QUERY_VECTORS; m++) sum[n][m] = fmadd(one, x[m], sum[n][m]);
        }
    }
}

// A chunk of one key/value head as floats: where they lie, or widened.
struct WidenedChunk {
    struct Session {};

    const float* keys[CHUNK_TOKENS];
    const float* values[CHUNK_TOKENS];
    float key_scales[CHUNK_TOKENS], value_scales[CHUNK_TOKENS];  // of int8

    static long memory(const Attention& op) { return 2 * CHUNK_TOKENS * op.dim; }

    static long width(const Attention& op) { return op.dim; }

    static void prepare(const Attention&, float*) {}

    const float* scales(const Attention& op) const { return op.type == INT8 ? value_scales : nullptr; }

    void fill(const Attention& op, const Chunk& chunk, long kv_head, float* memory) {
        const long head = kv_head * head_bytes(op.type, op.dim);
        widen(op, chunk, op.keys + head, memory, keys, key_scales);
        widen(op, chunk, op.values + head, memory + CHUNK_TOKENS * op.dim, values, value_scales);
    }

   private:
    static void widen(const Attention& op, const Chunk& chunk, const char* cache, float* memory, const float** rows,
                      float* scales) {
        for (long i = 0; i < CHUNK_TOKENS; i++) {
            const char* from = cache + chunk.offsets[i];
            float* to = memory + std::clamp(i, chunk.from, chunk.to - 1) * op.dim;
            rows[i] = op.type == FLOAT32 ? reinterpret_cast<const float*>(from) : to;
            if (op.type == FLOAT32 || i < chunk.from || i >= chunk.to) continue;
            if (op.type == BFLOAT16) {
                as_floats(reinterpret_cast<const uint16_t*>(from), op.dim, to);
            } else {
                std::memcpy(scales + i, from + op.dim, sizeof(float));
                long d = 0;
                for (; d + W <= op.dim; d += W) {
                    vf run[1];
                    load_run<INT8>(from + d, run);
                    store(to + d, run[0]);
                }
                for (; d < op.dim; d++) to[d] = static_cast<float>(static_cast<int8_t>(from[d]));
            }
        }
    }
};

template <bool SCALED>
inline void score(const VisibleSpan& span, const WidenedChunk& widened, const float* queries, long dim, float* scores) {
    for (long token = span.from / KEYS_AT_ONCE * KEYS_AT_ONCE; token < span.to; token += KEYS_AT_ONCE) {
        const float* rows[KEYS_AT_ONCE];
        std::copy(widened.keys + token, widened.keys + token + KEYS_AT_ONCE, rows);
        vf sum[KEYS_AT_ONCE][QUERY_VECTORS] = {};
        multiply<KEYS_AT_ONCE>(queries, dim, sum, [&](long i, int n) INLINE_LAMBDA { return rows[n][i]; });
#pragma GCC unroll 8
        for (int n = 0; n < KEYS_AT_ONCE; n++)
#pragma GCC unroll 4
            for (int m = 0; m < QUERY_VECTORS; m++)
                store(scores + ((token + n) * QUERY_VECTORS + m) * W,
                      SCALED ? sum[n][m] * splat(widened.key_scales[token + n]) : sum[n][m]);
    }
}

inline void score(const VisibleSpan& span, const WidenedChunk& widened, const float* queries, const Attention& op,
                  float* scores) {
    if (op.type == INT8)
        score<true>(span, widened, queries, op.dim, scores);
    else
        score<false>(span, widened, queries, op.dim, scores);
}

// acc [dim][QUERY_LANES], N features from `d` on, times `shrink`, plus the values times weights
// [CHUNK_TOKENS][QUERY_LANES].
template <int N>
INLINE void accumulate_tile(const VisibleSpan& span, const WidenedChunk& widened, const float* weights,
                            const vf (&shrink)[QUERY_VECTORS], long d, float* acc) {
    vf sum[N][QUERY_VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < QUERY_VECTORS; m++)
            sum[n][m] = opaque(load(acc + ((d + n) * QUERY_VECTORS + m) * W) * shrink[m]);
    const float* const* rows = widened.values + span.from;
    multiply<N>(weights + span.from * QUERY_LANES, span.to - span.from, sum,
                [&](long i, int n) INLINE_LAMBDA { return rows[i][d + n]; });
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int m = 0; m < QUERY_VECTORS; m++) store(acc + ((d + n) * QUERY_VECTORS + m) * W, sum[n][m]);
}

inline void accumulate(const VisibleSpan& span, const WidenedChunk& widened, const float* weights,
                       const vf (&shrink)[QUERY_VECTORS], long dim, float* acc) {
    long d = 0;
    for (; d + KEYS_AT_ONCE <= dim; d += KEYS_AT_ONCE)
        accumulate_tile<KEYS_AT_ONCE>(span, widened, weights, shrink, d, acc);
    for (; d < dim; d++) accumulate_tile<1>(span, widened, weights, shrink, d, acc);
}

// ---- Chunks in bfloat16, multiplied with AMX as they are. Queries and weights are rounded too (`ROUNDS_TO_BFLOAT16`).

#if defined(HAS_AMX)

// A chunk of one key/value head. A product of AMX tiles takes 32 features of keys, or the values of 32 tokens: those
// that a query does not attend to have the weight 0.
struct Bfloat16Chunk {
    using Session = AmxTiles;

    const uint16_t* keys;   // [CHUNK_TOKENS][width]
    const int32_t* values;  // [CHUNK_TOKENS / AMX_DEPTH][width][AMX_DEPTH / 2]: a feature of two tokens
    long features;          // width

    static long memory(const Attention& op) { return 3 * CHUNK_TOKENS / 2 * width(op); }

    // Zeros fill it up.
    static long width(const Attention& op) { return (op.dim + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH; }

    // Pairs of features in 32 bits: [width / 2][QUERY_LANES], in place.
    static void prepare(const Attention& op, float* queries) {
        for (long d = 0; d < width(op); d += 2)
            for (int m = 0; m < QUERY_VECTORS; m++) {
                const vf even = d < op.dim ? load(queries + (d * QUERY_VECTORS + m) * W) : vf{};
                const vf odd = d + 1 < op.dim ? load(queries + ((d + 1) * QUERY_VECTORS + m) * W) : vf{};
                store(queries + (d / 2 * QUERY_VECTORS + m) * W, bits(pairs_of_bfloat16(even, odd)));
            }
    }

    const float* scales(const Attention&) const { return nullptr; }

    void fill(const Attention& op, const Chunk& chunk, long kv_head, float* memory) {
        features = width(op);
        const long head = kv_head * head_bytes(op.type, op.dim);
        keys = copied(op, chunk, op.keys + head, memory);
        const uint16_t* rows = copied(op, chunk, op.values + head, memory + CHUNK_TOKENS / 2 * features);
        auto* to = reinterpret_cast<int32_t*>(memory + CHUNK_TOKENS * features);
        values = to;
        for (long token = 0; token < CHUNK_TOKENS; token += AMX_DEPTH, to += features * AMX_DEPTH / 2)
            for (long d = 0; d < features; d += W) {
                vf pairs[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    const uint16_t* even = rows + (token + 2 * i) * features + d;
                    pairs[i] = bits(bits(load_weights(even + features)) | ((bits(load_weights(even)) >> 16) & 0xffff));
                }
                transpose(pairs);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(to) + (d + i) * AMX_DEPTH / 2, pairs[i]);
            }
    }

   private:
    // [CHUNK_TOKENS][width]
    static const uint16_t* copied(const Attention& op, const Chunk& chunk, const char* cache, float* memory) {
        auto* to = reinterpret_cast<uint16_t*>(memory);
        for (long i = 0; i < CHUNK_TOKENS; i++) {
            std::memcpy(to + i * width(op), cache + chunk.offsets[i], static_cast<size_t>(2 * op.dim));
            std::fill(to + i * width(op) + op.dim, to + (i + 1) * width(op), uint16_t{0});
        }
        return to;
    }
};

// Bytes of all queries' floats.
constexpr long ROW_BYTES = QUERY_LANES * 4;

// AMX tiles 0 to QUERY_VECTORS - 1, of 16 rows and all queries, += an AMX tile times `pairs` [AMX_DEPTH /
// 2][QUERY_LANES].
INLINE void multiply_amx_tiles(const void* square, long stride, const float* pairs) {
    static_assert(QUERY_VECTORS == 3 && W == AMX_TILE_ROWS);
    AmxTiles::load<3>(square, stride);
    AmxTiles::load<4>(pairs, ROW_BYTES);
    AmxTiles::multiply_bfloat16<0, 3, 4>();
    AmxTiles::load<5>(pairs + W, ROW_BYTES);
    AmxTiles::multiply_bfloat16<1, 3, 5>();
    AmxTiles::load<6>(pairs + 2 * W, ROW_BYTES);
    AmxTiles::multiply_bfloat16<2, 3, 6>();
}

INLINE void store_amx_tiles(float* to) {
    AmxTiles::store<0>(to, ROW_BYTES);
    AmxTiles::store<1>(to + W, ROW_BYTES);
    AmxTiles::store<2>(to + 2 * W, ROW_BYTES);
}

// QUERY_VECTORS AMX tiles of scores at a time.
inline void score(const VisibleSpan& span, const Bfloat16Chunk& chunk, const float* queries, const Attention&,
                  float* scores) {
    for (long token = span.from / W * W; token < span.to; token += W) {
        AmxTiles::clear<0>();
        AmxTiles::clear<1>();
        AmxTiles::clear<2>();
        const float* pairs = queries;
        for (long d = 0; d < chunk.features; d += AMX_DEPTH, pairs += AMX_DEPTH / 2 * QUERY_LANES) {
            multiply_amx_tiles(chunk.keys + token * chunk.features + d, chunk.features * 2, pairs);
        }
        store_amx_tiles(scores + token * QUERY_LANES);
    }
}

// `weights` become pairs of tokens in 32 bits.
inline void accumulate(const VisibleSpan& span, const Bfloat16Chunk& chunk, float* weights,
                       const vf (&shrink)[QUERY_VECTORS], long, float* acc) {
    const long first = span.from / AMX_DEPTH * AMX_DEPTH;
    for (long i = first; i < (span.to + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH; i += 2)
        for (int m = 0; m < QUERY_VECTORS; m++) {
            const auto weight = [&](long at) INLINE_LAMBDA {
                return at >= span.from && at < span.to ? load(weights + (at * QUERY_VECTORS + m) * W) : vf{};
            };
            store(weights + (i / 2 * QUERY_VECTORS + m) * W, bits(pairs_of_bfloat16(weight(i), weight(i + 1))));
        }
    for (long d = 0; d < chunk.features; d += W) {
        float* sums = acc + d * QUERY_LANES;
        for (int i = 0; i < W; i++)
#pragma GCC unroll 4
            for (int m = 0; m < QUERY_VECTORS; m++) {
                float* at = sums + (i * QUERY_VECTORS + m) * W;
                store(at, load(at) * shrink[m]);
            }
        AmxTiles::load<0>(sums, ROW_BYTES);
        AmxTiles::load<1>(sums + W, ROW_BYTES);
        AmxTiles::load<2>(sums + 2 * W, ROW_BYTES);
        for (long half = first; half < span.to; half += AMX_DEPTH) {
            const float* pairs = weights + half / 2 * QUERY_LANES;
            multiply_amx_tiles(chunk.values + (half * chunk.features + d * AMX_DEPTH) / 2, 64, pairs);
        }
        store_amx_tiles(sums);
    }
}
#endif
