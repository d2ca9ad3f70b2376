// Dot products of rows of activations and rows of weights, as both lie in memory.
//
// Lane i of a vector sums features i, W + i, 2 W + i and so on, in this order; then the lanes are added, halves to
// halves. Every function here keeps to it, so a row's result is the same bits whatever rows it is computed with. One
// row reads its weights from beginning to end, and many rows need no packing: the price is adding the lanes, 8% of the
// work with 576 features in AVX-512.
#pragma once

#include "bfloat16.h"

// Size of a tile: as many sums as the registers hold beside a vector of each row.
constexpr int OUTPUTS_PER_TILE = W / 2;
constexpr int ROWS_PER_TILE = 3;

using vhalf = float __attribute__((vector_size(W * 2)));

// The first `count` < W numbers, and zeros.
template <typename T>
INLINE vf load_first(const T* from, long count) {
    alignas(64) T some[W] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
    return load_weights(some);
}

// Prefetches what is needed next in small portions: a few cache lines in each step of a product.
struct Prefetcher {
    const char* from;
    long lines;

    INLINE void step() {
        for (long i = 0; i < lines; i++) prefetch(from + i * 64);
        from += lines * 64;
    }
};

// acc += R rows times OUTPUTS_PER_TILE outputs, for features k to `end`. For weights that are in the cache, or asked
// for.
template <int R>
INLINE void multiply(const float* const (&weights)[OUTPUTS_PER_TILE], const float* x, long stride, long k, long end,
                     Prefetcher& ahead, vf (&acc)[OUTPUTS_PER_TILE][R]) {
    const float* outputs[OUTPUTS_PER_TILE];
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS_PER_TILE; n++) outputs[n] = weights[n];
    const auto step = [&](auto&& loaded) INLINE_LAMBDA {
        vf rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) rows[r] = loaded(x + r * stride + k);
#pragma GCC unroll 8
        for (int n = 0; n < OUTPUTS_PER_TILE; n++) {
            // Else GCC loads it once for each product, and loads are then what limits.
            const vf w = opaque(loaded(outputs[n] + k));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) acc[n][r] = fmadd(w, rows[r], acc[n][r]);
        }
    };
    Prefetcher next = ahead;  // in registers
    for (; k + W <= end; k += W) {
        next.step();
        step([](const float* from) INLINE_LAMBDA { return load(from); });
    }
    ahead = next;
    if (k < end) step([&](const float* from) INLINE_LAMBDA { return load_first(from, end - k); });
}

// Bytes from what is read to what is prefetched: further than the hardware's prefetcher, which stops at the end of a
// page.
constexpr long PREFETCH_BYTES = 2048;

// acc = R rows times OUTPUTS_PER_TILE outputs, one output after the other. For weights that come from memory.
template <int R, typename T>
INLINE void multiply_from_memory(const T* const (&weights)[OUTPUTS_PER_TILE], const float* x, long stride, long in,
                                 vf (&acc)[OUTPUTS_PER_TILE][R]) {
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS_PER_TILE; n++) {
        vf sums[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r] = vf{};
        const T* from = weights[n];
        long k = 0;
        for (; k + W <= in; k += W) {
            prefetch(reinterpret_cast<const char*>(from + k) + PREFETCH_BYTES);
            const vf w = load_weights(from + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r] = fmadd(w, load(x + r * stride + k), sums[r]);
        }
        if (k < in) {
            const vf w = load_first(from + k, in - k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r] = fmadd(w, load_first(x + r * stride + k, in - k), sums[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[n][r] = sums[r];
    }
}

// Adds up the lanes: OUTPUTS_PER_TILE numbers of each row, W floats from those of the row before.
template <int R>
INLINE void sum_lanes(const vf (&acc)[OUTPUTS_PER_TILE][R], float* to) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        vf sums[OUTPUTS_PER_TILE];
#pragma GCC unroll 8
        for (int n = 0; n < OUTPUTS_PER_TILE; n++) sums[n] = acc[n][r];
#pragma GCC unroll 4
        for (int n = OUTPUTS_PER_TILE; n > 1; n /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < n / 2; i++)
                sums[i] = interleave<false>(sums[i], sums[i + n / 2]) + interleave<true>(sums[i], sums[i + n / 2]);
        vhalf halves[2];
        std::memcpy(halves, &sums[0], sizeof halves);
        const vhalf total = halves[0] + halves[1];
        std::memcpy(to + r * W, &total, sizeof total);
    }
}
