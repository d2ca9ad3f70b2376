// What both attention kernels share: where a row's keys and values lie, and in which order they are added.
//
// A token's result is the same bits whether it comes alone (`attend_one`) or in a chunk (`attend_many`), whatever the
// batch: scores are sums in the order of the features, times the scale of an int8 key; weights are added in W sums, by their place in a chunk; values
// in the order of the tokens; parts one after the other. Chunks and parts begin at multiples of their size. What a
// token does not see has the weight 0, and adding that changes nothing, so it does not matter how much of it is skipped.
//
// With AMX and a cache in bfloat16, queries and weights are rounded to it as well, and sums are made of 32 products at a
// time as AMX makes them, see `ROUNDS`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
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
    // Floats that a head takes where it may be read beyond its end.
    long padded() const { return (dim + 4 * W - 1) / (4 * W) * (4 * W); }

    // The first place in the sequence that the token at place `at` sees.
    long first_seen(long at) const { return window > 0 ? std::max(0L, at - window + 1) : 0; }

    // What queries are multiplied with before they meet keys.
    float query_scale() const { return softcap > 0.0f ? scale / softcap : scale * LOG2_E; }
    // What becomes of that product.
    INLINE vf capped(vf product) const { return opaque(splat(softcap * LOG2_E) * tanh(product)); }
};

// Whether queries and weights are rounded to bfloat16 for a cache of that type. Each score and each sum of values is then
// a sum over groups of PRODUCTS, of a group's products at even places plus those at odd ones.
template <int TYPE>
constexpr bool ROUNDS = false;
constexpr int PRODUCTS = 32;
#if defined(HAS_AMX)
template <>
inline constexpr bool ROUNDS<BFLOAT16> = true;

// To the nearest bfloat16, what is below the smallest normal number to 0.
INLINE vf rounded_to_bfloat16(vf v) {
    return bits((vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)) << 16);
}

// Two numbers in each lane's 32 bits, rounded: of `even` in the lower half.
INLINE vi pairs_of_bfloat16(vf even, vf odd) {
    const auto one_after_other = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = i | (W + i) << 16;
    return (vi)_mm512_permutexvar_epi16((__m512i)lanes, one_after_other);
}
#else
INLINE vf rounded_to_bfloat16(vf v) { return v; }
#endif

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

    // The places of the vectors in which its tokens are.
    long first_vector() const { return from / W * W; }
    long end_vector() const { return (to + W - 1) / W * W; }

    // The scores of places `at` and on, where these are of the chunk.
    INLINE vf seen(vf scores, long at) const {
        vi place;
        for (int i = 0; i < W; i++) place[i] = i;
        place += splat(static_cast<int32_t>(at));
        const vf low = place >= splat(static_cast<int32_t>(from)) ? scores : splat(UNSEEN);
        return place < splat(static_cast<int32_t>(to)) ? low : splat(UNSEEN);
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

// Tokens `begin` to `end` of a row, all of one part, and key/value heads `kv_head` to `kv_end`.
struct Part {
    long row, begin, end, kv_head, kv_end;
};

// The heads of a row's only token (decode) against a part, all of which it sees. Leaves `partial_size` floats for each
// key/value head: not yet divided by the totals. The part `after` is most likely next in this thread.
void attend_one(const Attention& op, const Part& part, const Part& after, float* partials);

// Sums of values as `attend_one` keeps them, times `one`, to `out` [dim].
void write_sums(const Attention& op, const float* sums, float one, float* out);

// Positions first to first + count of the row, all heads of one key/value head: their places in `out` are written.
void attend_many(const Attention& op, long row, long first, long count, long kv_head);

// Positions whose queries fill so many of the tiles in which `attend_many` takes them.
long positions_at_once(const Attention& op, long tiles);
