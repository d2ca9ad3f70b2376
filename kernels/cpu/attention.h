// What both attention kernels share: where a row's keys and values lie, and in which order they are added.
//
// A token's result is the same bits whether it comes alone (`attend_one`) or in a chunk (`attend_many`), whatever the
// batch: scores are sums in the order of the features; weights are added in W sums, by their place in a chunk; values
// in the order of the tokens. Chunks and parts begin at multiples of their size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "floats.h"
#include "simd.h"

constexpr int CHUNK = 64;
// Tokens between two looks at the running maximum (online softmax, arXiv:1805.02867).
constexpr long PART = 512;
// Tokens that are summed up for themselves: so one long row does not keep a single thread busy.
constexpr float LOWEST = -1e30f;
// A running maximum before there is one: finite, so that differences are.

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
    float* out;  // [tokens][heads][dim]
    int type;    // of the cache

    long group() const { return heads / kv_heads; }
    long token_bytes() const { return kv_heads * head_bytes(type, dim); }

    // The offset of a row's token in `keys` and `values`, in bytes.
    long offset(long row, long token, long kv_head) const {
        const long block = tables[row * width + token / block_size];
        return (block * block_size + token % block_size) * token_bytes() + kv_head * head_bytes(type, dim);
    }
};

// One head of a row's tokens `begin` to `end`, of one chunk, as floats: in the cache, or widened into `to` [CHUNK][dim].
class Tokens {
   public:
    Tokens(const Attention& op, const char* cache, long row, long kv_head, long begin, long end, float* to)
        : op_(op), cache_(cache), row_(row), kv_head_(kv_head), begin_(begin), wide_(nullptr) {
        if (op.type == FLOAT32) return;
        wide_ = to;
        for (long token = begin; token < end; token++)
            widen(cache + op.offset(row, token, kv_head), to + (token - begin) * op.dim);
    }

    const float* at(long token) const {
        if (wide_) return wide_ + (token - begin_) * op_.dim;
        return reinterpret_cast<const float*>(cache_ + op_.offset(row_, token, kv_head_));
    }

    // Floats from one token to the next, and tokens from `token` up to `end` that lie so.
    long stride() const { return wide_ ? op_.dim : op_.kv_heads * op_.dim; }

    long run_length(long token, long end) const {
        return wide_ ? end - token : std::min(end, (token / op_.block_size + 1) * op_.block_size) - token;
    }

   private:
    void widen(const char* from, float* to) const {
        if (op_.type == BFLOAT16) {
            as_floats(reinterpret_cast<const uint16_t*>(from), op_.dim, to);
            return;
        }
        float scale;
        std::memcpy(&scale, from + op_.dim, sizeof scale);
        for (long d = 0; d < op_.dim; d++) to[d] = static_cast<float>(static_cast<int8_t>(from[d])) * scale;
    }

    const Attention& op_;
    const char* cache_;
    long row_, kv_head_, begin_;
    float* wide_;
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
