// Shared by both attention kernels: where a row's keys and values lie, and in which order they are added.
//
// A token's result is the same bits whether it comes alone (`attend_decode`) or in a chunk (`attend_prefill`), whatever
// the batch: scores are sums in the order of the features, times the scale of an int8 key; weights are added in W sums,
// by their place in a chunk; values in the order of the tokens; splits one after the other. Chunks and splits begin at
// multiples of their size. What a token does not see has the weight 0, and adding that changes nothing, so it does not
// matter how much of it is skipped.
//
// With AMX and a cache in bfloat16, queries and weights are rounded to it as well, and sums are made of 32 products at
// a time as AMX makes them, see `ROUNDS_TO_BFLOAT16`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
#include "bfloat16.h"
#include "exports.h"
#include "simd.h"

// Tokens between two updates of the running maximum (online softmax, arXiv:1805.02867).
constexpr int CHUNK_TOKENS = 64;
// Tokens of the KV cache that are summed up by themselves (split KV, as in flash-decoding), so that one long row does
// not keep a single thread busy.
constexpr long SPLIT_TOKENS = 128;
// The running maximum before the first score: finite, so that differences are finite.
constexpr float INITIAL_MAX = -1e30f;
// The score of a token that a query does not attend to: its weight is 0 even against `INITIAL_MAX`.
constexpr float MASKED_SCORE = 2 * INITIAL_MAX;
// log2(e). Scores are kept times this, because powers of two are cheaper than those of e.
constexpr float LOG2_E = 1.44269504f;

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

    // The first place in the sequence that the token at place `at` attends to.
    long first_visible(long at) const { return window > 0 ? std::max(0L, at - window + 1) : 0; }

    // Factor of queries before they are multiplied with keys.
    float query_scale() const { return softcap > 0.0f ? scale / softcap : scale * LOG2_E; }
    // The score for that product, with softcap.
    INLINE vf capped(vf product) const { return opaque(splat(softcap * LOG2_E) * tanh(product)); }
};

// True if queries and weights are rounded to bfloat16 for a cache of that type. Each score and each sum of values is
// then a sum over groups of AMX_DEPTH, of a group's products at even places plus those at odd ones.
template <int TYPE>
constexpr bool ROUNDS_TO_BFLOAT16 = false;
// Products that one AMX instruction adds to a sum: bfloat16 numbers in 64 bytes.
constexpr int AMX_DEPTH = 32;
#if defined(HAS_AMX)
template <>
inline constexpr bool ROUNDS_TO_BFLOAT16<BFLOAT16> = true;

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

// Tokens of a row that are taken at once: those at places `from` to `to` after `base`, a multiple of CHUNK_TOKENS.
struct Chunk {
    long base, from, to;
    long offsets[CHUNK_TOKENS];  // of head 0 of the token at each place, in bytes; at others that of one which is there

    Chunk(const Attention& op, long row, long begin, long end) {
        base = begin / CHUNK_TOKENS * CHUNK_TOKENS;
        from = begin - base;
        to = std::min<long>(CHUNK_TOKENS, end - base);
        const long bytes = op.kv_heads * head_bytes(op.type, op.dim);
        for (long i = from; i < to;) {
            const long block = (base + i) / op.block_size;
            const long stop = std::min(to, (block + 1) * op.block_size - base);
            long at = (op.tables[row * op.width + block] * op.block_size + base + i - block * op.block_size) * bytes;
            for (; i < stop; i++, at += bytes) offsets[i] = at;
        }
        std::fill(offsets, offsets + from, offsets[from]);
        std::fill(offsets + to, offsets + CHUNK_TOKENS, offsets[to - 1]);
    }

    // The places of the vectors in which its tokens are.
    long first_vector() const { return from / W * W; }
    long end_vector() const { return (to + W - 1) / W * W; }

    // The scores of places `at` and on; `MASKED_SCORE` where these are not of the chunk.
    INLINE vf masked(vf scores, long at) const {
        vi place;
        for (int i = 0; i < W; i++) place[i] = i;
        place += splat(static_cast<int32_t>(at));
        const vf low = place >= splat(static_cast<int32_t>(from)) ? scores : splat(MASKED_SCORE);
        return place < splat(static_cast<int32_t>(to)) ? low : splat(MASKED_SCORE);
    }
};

// Adds the sums of a later split to those before it: its maxima and totals here, and returns in `keep` and `add` what
// the sums of values are to be multiplied with.
INLINE void merge_softmax(vf& running_max, vf& total, vf other_max, vf other_total, vf& keep, vf& add) {
    const vf highest = max(running_max, other_max);
    keep = exp2(running_max - highest);
    add = exp2(other_max - highest);
    running_max = highest;
    total = fmadd(add, other_total, keep * total);
}

// Floats that `attend_decode` leaves for a key/value head: sums of values [group][padded], then totals and maxima
// [group].
INLINE long partial_size(const Attention& op) { return op.group() * (op.padded() + 2); }

// Tokens `begin` to `end` of a row, all of one split, and key/value heads `kv_head` to `kv_end`.
struct KvSplit {
    long row, begin, end, kv_head, kv_end;
};

// The heads of a row's only token (decode) against a split, all of which it attends to. Leaves `partial_size` floats
// for each key/value head: not yet divided by the totals. The split `after` is most likely next in this thread.
void attend_decode(const Attention& op, const KvSplit& split, const KvSplit& after, float* partials);

// Sums of values as `attend_decode` keeps them, times `one`, to `out` [dim].
void write_sums(const Attention& op, const float* sums, float one, float* out);

// Positions first to first + count of the row, all heads of one key/value head: their places in `out` are written.
void attend_prefill(const Attention& op, long row, long first, long count, long kv_head);

// Number of positions whose queries fill `tiles` of the tiles in which `attend_prefill` takes them.
long positions_at_once(const Attention& op, long tiles);
