// What both attention kernels share: where a row's keys and values lie, and in which order they are added.
//
// A token's result is the same bits whether it comes alone (`attend_one`) or in a chunk (`attend_many`), whatever the
// batch: scores are sums in the order of the features; weights are added in W sums, by their place in a chunk; values
// in the order of the tokens; parts one after the other. Chunks and parts begin at multiples of their size. What a
// token does not see has the weight 0, and adding that changes nothing, so it does not matter how much of it is skipped.
#pragma once

#include <algorithm>
#include <cstdint>

#include "floats.h"
#include "simd.h"

constexpr int CHUNK = 64;
// Tokens between two looks at the running maximum (online softmax, arXiv:1805.02867).
constexpr long PART = 128;
// Tokens that are summed up for themselves: so one long row does not keep a single thread busy.
constexpr float LOWEST = -1e30f;
// A running maximum before there is one: finite, so that differences are.
constexpr float UNSEEN = 2 * LOWEST;
constexpr float LOG2_E = 1.44269504f;
// Scores are kept times this: powers of two are cheaper than those of e.

enum CacheType : int { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// Bytes of one token's head in the cache: for int8 its scale, a float, follows its values.
INLINE long head_bytes(int type, long dim) { return type == FLOAT32 ? 4 * dim : type == BFLOAT16 ? 2 * dim : dim + 4; }

struct Attention {
    const float* q;     // [tokens][heads][dim]
    long q_stride;      // floats from one token to the next
    const char* keys;   // [blocks][block_size][kv_heads][head_bytes]
    const char* values;
    const int64_t* tables;  // [rows][width] block ids
    long width;
    const int64_t* extents;  // [rows][3]: first token in the batch, tokens, tokens before them in the cache
    long heads, kv_heads, dim, block_size;
    float scale;
    long window;    // tokens that a token sees, itself included; 0: all before it
    float softcap;  // what scaled scores are bent to stay below; 0: not
    float* out;     // [tokens][heads][dim]
    int type;       // of the cache

    long group() const { return heads / kv_heads; }
    long padded() const { return (dim + W - 1) / W * W; }

    // The first place in the sequence that the token at place `at` sees.
    long first_seen(long at) const { return window > 0 ? std::max(0L, at - window + 1) : 0; }

    // What queries are multiplied with before they meet keys.
    float query_scale() const { return softcap > 0.0f ? scale / softcap : scale * LOG2_E; }
    // What becomes of that product.
    INLINE vf capped(vf product) const { return opaque(splat(softcap * LOG2_E) * tanh(product)); }
};

// Tokens of a row that are taken at once: those at places `from` to `to` after `base`, a multiple of CHUNK.
struct Chunk {
    long base, from, to;
    long offsets[CHUNK];  // of head 0 of the token at each place, in bytes; at others that of one which is there

    Chunk(const Attention& op, long row, long begin, long end) {
        base = begin / CHUNK * CHUNK;
        from = begin - base;
        to = std::min<long>(CHUNK, end - base);
        const long bytes = op.kv_heads * head_bytes(op.type, op.dim);
        for (long i = from; i < to;) {
            const long block = (base + i) / op.block_size;
            const long stop = std::min(to, (block + 1) * op.block_size - base);
            long at = (op.tables[row * op.width + block] * op.block_size + base + i - block * op.block_size) * bytes;
            for (; i < stop; i++, at += bytes) offsets[i] = at;
        }
        std::fill(offsets, offsets + from, offsets[from]);
        std::fill(offsets + to, offsets + CHUNK, offsets[to - 1]);
    }
};

// One head of a chunk's tokens as they lie in the cache, and as floats: there, or widened into `wide` [CHUNK][dim].
struct Rows {
    const char* stored[CHUNK];
    const float* at[CHUNK];

    Rows(const Attention& op, const Chunk& chunk, const char* cache, long kv_head) {
        cache += kv_head * head_bytes(op.type, op.dim);
        for (int i = 0; i < CHUNK; i++) stored[i] = cache + chunk.offsets[i];
    }

    void widen(const Attention& op, const Chunk& chunk, float* wide) {
        for (long i = 0; i < CHUNK; i++) {
            float* to = wide + std::clamp(i, chunk.from, chunk.to - 1) * op.dim;
            at[i] = op.type == FLOAT32 ? reinterpret_cast<const float*>(stored[i]) : to;
            if (op.type != FLOAT32 && i >= chunk.from && i < chunk.to) widen_head(op, stored[i], to);
        }
    }

   private:
    static void widen_head(const Attention& op, const char* from, float* to) {
        if (op.type == BFLOAT16) {
            as_floats(reinterpret_cast<const uint16_t*>(from), op.dim, to);
            return;
        }
        float scale;
        std::memcpy(&scale, from + op.dim, sizeof scale);
        for (long d = 0; d < op.dim; d++) to[d] = static_cast<float>(static_cast<int8_t>(from[d])) * scale;
    }
};

// Adds the sums of a later part to those before it: its maxima and totals here, and returns in `keep` and `add` what
// the sums of values are to be multiplied with.
INLINE void merge(vf& top, vf& total, vf other_top, vf other_total, vf& keep, vf& add) {
    const vf highest = max(top, other_top);
    keep = exp2(top - highest);
    add = exp2(other_top - highest);
    top = highest;
    total = fused(add, other_total, keep * total);
}

// Floats that `attend_one` leaves for a key/value head: sums of values [group][padded], then totals and maxima [group].
INLINE long partial_size(const Attention& op) { return op.group() * (op.padded() + 2); }

// The heads of one token (decode), against tokens `begin` to `end` of the row, all of one part, which it sees. Leaves
// for each key/value head from `kv_head` to `kv_end` its `partial_size` floats: not yet divided by the totals.
void attend_one(const Attention& op, long row, long kv_head, long kv_end, long begin, long end, float* partials);

// Positions first to first + count of the row, all heads of one key/value head: their places in `out` are written.
void attend_many(const Attention& op, long row, long first, long count, long kv_head);

// Positions that `attend_many` takes at once.
long positions_at_once(const Attention& op);
