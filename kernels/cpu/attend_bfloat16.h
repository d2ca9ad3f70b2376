// Chunks in bfloat16, multiplied with AMX as they are: queries and weights are rounded to bfloat16 too, see `ROUNDS`.
#pragma once

#include "attend_many.h"

#if defined(HAS_AMX)

// A chunk of one key/value head. A product of squares takes in 32 features of keys, or the values of 32 tokens: those that
// a query does not see have the weight 0.
struct Bfloat16 {
    using Session = Squares;

    const uint16_t* keys;   // [CHUNK][width]
    const int32_t* values;  // [CHUNK / PRODUCTS][width][PRODUCTS / 2]: a feature of two tokens
    long features;          // width

    static long memory(const Attention& op) { return 3 * CHUNK / 2 * width(op); }

    // Zeros fill it up.
    static long width(const Attention& op) { return (op.dim + PRODUCTS - 1) / PRODUCTS * PRODUCTS; }

    // Pairs of features in 32 bits: [width / 2][LANES], in place.
    static void prepare(const Attention& op, float* queries) {
        for (long d = 0; d < width(op); d += 2)
            for (int m = 0; m < MV; m++) {
                const vf even = d < op.dim ? load(queries + (d * MV + m) * W) : vf{};
                const vf odd = d + 1 < op.dim ? load(queries + ((d + 1) * MV + m) * W) : vf{};
                store(queries + (d / 2 * MV + m) * W, bits(pairs_of_bfloat16(even, odd)));
            }
    }

    const float* scales(const Attention&) const { return nullptr; }

    void fill(const Attention& op, const Chunk& chunk, long kv_head, float* memory) {
        features = width(op);
        const long head = kv_head * head_bytes(op.type, op.dim);
        keys = copied(op, chunk, op.keys + head, memory);
        const uint16_t* rows = copied(op, chunk, op.values + head, memory + CHUNK / 2 * features);
        auto* to = reinterpret_cast<int32_t*>(memory + CHUNK * features);
        values = to;
        for (long token = 0; token < CHUNK; token += PRODUCTS, to += features * PRODUCTS / 2)
            for (long d = 0; d < features; d += W) {
                vf pairs[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    const uint16_t* even = rows + (token + 2 * i) * features + d;
                    pairs[i] = bits(bits(load_weights(even + features)) | ((bits(load_weights(even)) >> 16) & 0xffff));
                }
                transpose(pairs);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(to) + (d + i) * PRODUCTS / 2, pairs[i]);
            }
    }

   private:
    // [CHUNK][width]
    static const uint16_t* copied(const Attention& op, const Chunk& chunk, const char* cache, float* memory) {
        auto* to = reinterpret_cast<uint16_t*>(memory);
        for (long i = 0; i < CHUNK; i++) {
            std::memcpy(to + i * width(op), cache + chunk.offsets[i], static_cast<size_t>(2 * op.dim));
            std::fill(to + i * width(op) + op.dim, to + (i + 1) * width(op), uint16_t{0});
        }
        return to;
    }
};

constexpr long ROW_BYTES = LANES * 4;

// The squares 0 to MV - 1, of 16 rows and all queries, += a square times `pairs` [PRODUCTS / 2][LANES].
INLINE void multiply_squares(const void* square, long stride, const float* pairs) {
    static_assert(MV == 3 && W == SQUARE_ROWS);
    Squares::load<3>(square, stride);
    Squares::load<4>(pairs, ROW_BYTES);
    Squares::multiply_bfloat16<0, 3, 4>();
    Squares::load<5>(pairs + W, ROW_BYTES);
    Squares::multiply_bfloat16<1, 3, 5>();
    Squares::load<6>(pairs + 2 * W, ROW_BYTES);
    Squares::multiply_bfloat16<2, 3, 6>();
}

INLINE void store_squares(float* to) {
    Squares::store<0>(to, ROW_BYTES);
    Squares::store<1>(to + W, ROW_BYTES);
    Squares::store<2>(to + 2 * W, ROW_BYTES);
}

// MV squares of scores at a time.
inline void score(const Span& span, const Bfloat16& chunk, const float* queries, const Attention&, float* scores) {
    for (long token = span.from / W * W; token < span.to; token += W) {
        Squares::clear<0>();
        Squares::clear<1>();
        Squares::clear<2>();
        const float* pairs = queries;
        for (long d = 0; d < chunk.features; d += PRODUCTS, pairs += PRODUCTS / 2 * LANES) {
            multiply_squares(chunk.keys + token * chunk.features + d, chunk.features * 2, pairs);
        }
        store_squares(scores + token * LANES);
    }
}

// `weights` become pairs of tokens in 32 bits.
inline void mix(const Span& span, const Bfloat16& chunk, float* weights, const vf (&shrink)[MV], long, float* acc) {
    const long first = span.from / PRODUCTS * PRODUCTS;
    for (long i = first; i < (span.to + PRODUCTS - 1) / PRODUCTS * PRODUCTS; i += 2)
        for (int m = 0; m < MV; m++) {
            const auto weight = [&](long at) INLINE_LAMBDA {
                return at >= span.from && at < span.to ? load(weights + (at * MV + m) * W) : vf{};
            };
            store(weights + (i / 2 * MV + m) * W, bits(pairs_of_bfloat16(weight(i), weight(i + 1))));
        }
    for (long d = 0; d < chunk.features; d += W) {
        float* sums = acc + d * LANES;
        for (int i = 0; i < W; i++)
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) {
                float* at = sums + (i * MV + m) * W;
                store(at, load(at) * shrink[m]);
            }
        Squares::load<0>(sums, ROW_BYTES);
        Squares::load<1>(sums + W, ROW_BYTES);
        Squares::load<2>(sums + 2 * W, ROW_BYTES);
        for (long half = first; half < span.to; half += PRODUCTS) {
            const float* pairs = weights + half / 2 * LANES;
            multiply_squares(chunk.values + (half * chunk.features + d * PRODUCTS) / 2, 64, pairs);
        }
        store_squares(sums);
    }
}
#endif
