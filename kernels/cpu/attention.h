// What both attention kernels share: where a row's keys and values lie.
#pragma once

#include <cstdint>

#include "simd.h"

constexpr int CHUNK = 64;
// Tokens between two looks at the running maximum (online softmax, arXiv:1805.02867). Chunks begin at multiples
// of it, whatever the batch, so that a row's sums do not depend on what it was computed with.
constexpr float LOWEST = -1e30f;
// A running maximum before there is one: finite, so that differences are.

struct Attention {
    const float* q;       // [tokens][heads][dim]
    long q_stride;        // floats from one token to the next
    const float* keys;    // [blocks][block_size][kv_heads][dim]
    const float* values;
    const int64_t* tables;  // [rows][width] block ids
    long width;
    const int64_t* extents;  // [rows][3]: first token in the batch, tokens, tokens before them in the cache
    long heads, kv_heads, dim, block_size;
    float scale;
    float* out;  // [tokens][heads][dim]

    long group() const { return heads / kv_heads; }
    long token_stride() const { return kv_heads * dim; }

    // The offset of a row's token in `keys` and `values`.
    long offset(long row, long token, long kv_head) const {
        const long block = tables[row * width + token / block_size];
        return ((block * block_size + token % block_size) * kv_heads + kv_head) * dim;
    }
};

// `queries` heads of one token against tokens `begin` to `end` of the row (decode). Leaves the weighted sum of
// the values in acc [queries][dim], not yet divided by total [queries], and the maximum score in top [queries].
void attend_one(const Attention& op, long row, long token, long kv_head, long begin, long end, float* acc,
                float* total, float* top);

// Positions first to first + count of the row, all heads of one key/value head: their places in `out` are written.
void attend_many(const Attention& op, long row, long first, long count, long kv_head);

// Positions that `attend_many` takes at once.
long positions_at_once(const Attention& op);

// Whether `attend_one` has a version for this head_dim.
bool can_attend_one(long dim);
