// What the machine can do at most: reading memory, float32 multiply-adds, products of bytes. One call is one thread's.
// And a loop around linears, so that what they can do is not measured through Python.
#include "exports.h"
#include "int8_dot.h"

// Reads `bytes`, a multiple of 1024, `times` over; what comes next is left to the hardware to guess.
EXPORT float read_memory(const char* from, long bytes, long times) {
    constexpr int STEP = W * 4;
    vi sums[8] = {};
    for (long time = 0; time < times; time++)
        for (long at = 0; at < bytes; at += 8 * STEP)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                vi v;
                std::memcpy(&v, from + at + i * STEP, sizeof v);
                sums[i] ^= v;
            }
    float total = 0.0f;
    for (const vi& sum : sums) total += static_cast<float>(sum[0]);
    return total;
}

// Keeps the compiler from computing a loop beforehand.
#if defined(__x86_64__)
#define KEEP(v) asm volatile("" : "+v"(v))
#else
#define KEEP(v) asm volatile("" : "+w"(v))
#endif

constexpr int CHAINS = W == 16 ? 24 : 12;

// Runs `count` times CHAINS vectors of multiply-adds; returns how many floats a vector has times CHAINS.
EXPORT long multiply_floats(long count, float factor, float* out) {
    vf acc[CHAINS] = {};
    const vf a = splat(factor), b = splat(1.0f - factor);
    for (long i = 0; i < count; i++)
#pragma GCC unroll 24
        for (int j = 0; j < CHAINS; j++) {
            acc[j] = acc[j] * a + b;
            KEEP(acc[j]);
        }
#pragma GCC unroll 24
    for (int j = 0; j < CHAINS; j++) *out += acc[j][0];
    return CHAINS * W;
}

// The same with products of bytes: add(sum, w, x) adds those of a vector. Returns products a count.
template <typename Add>
INLINE long multiply_chains(long count, int32_t seed, float* out, Add&& add) {
    vi acc[CHAINS] = {};
    vi w = splat(seed), x = splat(seed / 3);
    for (long i = 0; i < count; i++)
#pragma GCC unroll 24
        for (int j = 0; j < CHAINS; j++) {
            add(acc[j], w, x);
            KEEP(acc[j]);
        }
#pragma GCC unroll 24
    for (int j = 0; j < CHAINS; j++) *out += static_cast<float>(acc[j][0]);
    return CHAINS * W * 4;
}

// Each pair or four is added up in 32 bits, as it must be where a whole row has one scale.
EXPORT long multiply_wide_bytes(long count, int32_t seed, float* out) {
    return multiply_chains(count, seed, out, [](vi& sum, vi& w, vi& x) INLINE_LAMBDA {
#if defined(__AVX512VNNI__)
        sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
        sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
            sum += sum_pairs(multiply_pairs(w, x));
            KEEP(w);
#else
            sum = dot_quad(sum, x, Int8Quad(w));
#endif
    });
}

// As kernels make them whose groups have scales of their own.
EXPORT long multiply_bytes(long count, int32_t seed, float* out) {
    return multiply_chains(count, seed, out, [](vi& sum, vi& w, vi& x) INLINE_LAMBDA {
#if defined(__AVX512VNNI__)
        sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
            sum = add_pairs(sum, multiply_pairs(w, x));
            KEEP(w);
#else
            sum = dot_quad(sum, x, Int8Quad(w));
#endif
    });
}

// y [rows, out] = x [rows, in] times each of `calls` weights in turn; `weights` [calls][3]: as for a `LinearFunction`.
EXPORT void multiply_weights(LinearFunction* op, const float* x, long rows, long in, long out,
                             const void* const* weights, long calls, float* y, int threads) {
    for (const void* const* w = weights; w < weights + calls * 3; w += 3)
        op(x, in, rows, in, out, w[0], w[1], w[2], nullptr, nullptr, 0.0f, nullptr, y, 0, nullptr, threads);
}
