// Vectors of floats as wide as the instruction set that this file is compiled for. GCC's and Clang's vector
// extension spells them, so one source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Floats in a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using vf = float __attribute__((vector_size(W * 4)));
using vi = int32_t __attribute__((vector_size(W * 4)));

#define INLINE inline __attribute__((always_inline))

#define INLINE_LAMBDA __attribute__((always_inline))

constexpr int FLOATS_PER_CACHE_LINE = 16;

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - vf{}; }

INLINE vi splat(int32_t x) { return x + vi{}; }

INLINE vf bits(vi v) { return reinterpret_cast<vf>(v); }

INLINE vi bits(vf v) { return reinterpret_cast<vi>(v); }

// x, of whose making the compiler knows nothing from here on: what follows is computed as it is written for vectors.
template <typename V>
INLINE V opaque(V x) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#else
    asm("" : "+x"(x));
#endif
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

// a * b + c, rounded once where the processor can: where the compiler might fuse one of two places that must agree.
INLINE vf fmadd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

INLINE float sum(vf v) {
    float parts[W];
    store(parts, v);
    for (int step = W / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

INLINE int32_t sum(vi v) {
    int32_t parts[W];
    std::memcpy(parts, &v, sizeof v);
    for (int step = W / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

INLINE float maximum(vf v) {
    float parts[W];
    store(parts, v);
    for (int step = W / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) parts[i] = parts[i] > parts[i + step] ? parts[i] : parts[i + step];
    return parts[0];
}

// e to the power of x, within 2 ulp; 0 below -87, NaN of NaN. The polynomial is Cephes' expf.
INLINE vf exp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.37626f);
    vf inside = x < low ? low : x;  // in this order a NaN stays one
    inside = inside > high ? high : inside;
    const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer in the low bits
    const vf shifted = inside * splat(1.44269504f) + magic;
    const vf n = shifted - magic;
    vf r = inside - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const vi power = (bits(shifted) - bits(magic) + 127) << 23;
    const vf result = p * bits(power);
    return x < low ? vf{} : result;
}

// 2 to the power of x <= 0, within 2e-7 of itself; 0 below -126.5, exactly 1 at 0, NaN of NaN. A minimax polynomial of
// 2^r - 1 over r.
INLINE vf exp2(vf x) {
    const vf low = splat(-127.0f), magic = splat(12582912.0f);
    const vf inside = x < low ? low : x;  // in this order a NaN stays one
    const vf shifted = inside + magic;
    const vf r = inside - (shifted - magic);
    vf p = splat(1.326472731307149e-3f);
    p = p * r + splat(9.671512991189957e-3f);
    p = p * r + splat(5.550733581185341e-2f);
    p = p * r + splat(2.402224242687225e-1f);
    p = p * r + splat(6.931470036506653e-1f);
    p = p * r + splat(1.0f);
    return p * bits((bits(shifted) - bits(magic) + 127) << 23);
}

// Within 2e-7.
INLINE vf tanh(vf x) { return splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp(x + x)); }

// Within 5e-7; exactly 1 and -1 beyond 4. The rational minimax approximation is Eigen's.
INLINE vf erf(vf x) {
    const vf most = splat(4.0f);
    vf y = x > most ? most : x;  // in this order a NaN stays one
    y = y < -most ? -most : y;
    const vf z = y * y;
    vf p = splat(-2.72614225801306e-10f);
    p = p * z + splat(2.77068142495902e-8f);
    p = p * z + splat(-2.10102402082508e-6f);
    p = p * z + splat(-5.69250639462346e-5f);
    p = p * z + splat(-7.34990630326855e-4f);
    p = p * z + splat(-2.95459980854025e-3f);
    p = p * z + splat(-1.60960333262415e-2f);
    vf q = splat(-1.45660718464996e-5f);
    q = q * z + splat(-2.13374055278905e-4f);
    q = q * z + splat(-1.68282697438203e-3f);
    q = q * z + splat(-7.37332916720468e-3f);
    q = q * z + splat(-1.42647390514189e-2f);
    const vf inside = y * p / q;
    const vf above = x >= most ? splat(1.0f) : inside;
    return x <= -most ? splat(-1.0f) : above;
}

INLINE vf gelu(vf x) { return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f))); }

// The approximation x / 2 (1 + tanh(u)), which is x / (1 + e^-2u).
INLINE vf gelu_tanh(vf x) {
    const vf u = splat(0.79788456f) * (x + splat(0.044715f) * x * x * x);
    return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

INLINE vf silu(vf x) { return x / (splat(1.0f) + exp(-x)); }

// First halves of a and b, or second halves, element by element in turn.
template <bool high>
INLINE vf interleave(vf a, vf b) {
    constexpr int o = high ? W / 2 : 0;
#if defined(__clang__)
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, o, W + o, o + 1, W + o + 1, o + 2, W + o + 2, o + 3, W + o + 3, o + 4,
                                   W + o + 4, o + 5, W + o + 5, o + 6, W + o + 6, o + 7, W + o + 7);
#elif defined(__AVX__)
    return __builtin_shufflevector(a, b, o, W + o, o + 1, W + o + 1, o + 2, W + o + 2, o + 3, W + o + 3);
#else
    return __builtin_shufflevector(a, b, o, W + o, o + 1, W + o + 1);
#endif
#else
    vi order;
    for (int i = 0; i < W; i++) order[i] = i / 2 + o + (i % 2 ? W : 0);
    return __builtin_shuffle(a, b, order);
#endif
}

// rows[i][j] becomes rows[j][i]: the perfect shuffle, log2(W) times. Source: H. S. Stone, Parallel processing with the
// perfect shuffle, 1971.
#if defined(__clang__) || !defined(__AVX__)
INLINE void transpose(vf (&rows)[W]) {
    for (int stage = 1; stage < W; stage *= 2) {
        vf next[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = interleave<false>(rows[i], rows[i + W / 2]);
            next[2 * i + 1] = interleave<true>(rows[i], rows[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) rows[i] = next[i];
    }
}

// Lane i of the result is what `add` makes of all lanes of rows[i], two vectors at a time.
template <int N = W, typename Add>
INLINE vf reduce_rows(const vf (&rows)[N], Add&& add) {
    if constexpr (N == 1) {
        return rows[0];
    } else {
        vf half[N / 2];
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; i++)
            half[i] = add(interleave<false>(rows[i], rows[i + N / 2]), interleave<true>(rows[i], rows[i + N / 2]));
        return reduce_rows<N / 2>(half, add);
    }
}
#else
// Element j of lane l, of four elements each, becomes number order(l, j) of a's elements and then b's.
template <typename Order>
INLINE vf picked(vf a, vf b, Order&& order) {
    vi from;
    for (int i = 0; i < W; i++) from[i] = order(i / 4, i % 4);
    return __builtin_shuffle(a, b, from);
}

// The orders that `transpose` and `reduce_rows` pick in: elements of a and b in turn, two of each in turn,
// and lanes, the even ones or the first. The rest of the elements are 2, 2 and 4 from them.
constexpr auto BY_ONES = [](int l, int j) INLINE_LAMBDA { return 4 * l + j / 2 + j % 2 * W; };
constexpr auto BY_TWOS = [](int l, int j) INLINE_LAMBDA { return 4 * l + j % 2 + j / 2 * W; };
#if defined(__AVX512F__)
constexpr auto BY_LANES = [](int l, int j) INLINE_LAMBDA { return l % 2 * 8 + l / 2 * W + j; };
#else
constexpr auto BY_LANES = [](int l, int j) INLINE_LAMBDA { return l * W + j; };
#endif

// With AVX it takes fewer instructions within lanes of four first, and then by whole lanes.
INLINE void transpose(vf (&rows)[W]) {
    vf half[W], quarter[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
        half[i] = picked(rows[i], rows[i + 1], BY_ONES);
        half[i + 1] = picked(rows[i], rows[i + 1], [&](int l, int j) INLINE_LAMBDA { return BY_ONES(l, j) + 2; });
    }
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const vf a = half[i + k], b = half[i + k + 2];
            quarter[i + 2 * k] = picked(a, b, BY_TWOS);
            quarter[i + 2 * k + 1] = picked(a, b, [&](int l, int j) INLINE_LAMBDA { return BY_TWOS(l, j) + 2; });
        }
    // Lane l of quarter[4 r + c] now holds feature 4 l + c of rows 4 r to 4 r + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
#if defined(__AVX512F__)
        const auto odd = [&](int l, int j) INLINE_LAMBDA { return BY_LANES(l, j) + 4; };
        const vf a = picked(quarter[c], quarter[4 + c], BY_LANES),
                 b = picked(quarter[8 + c], quarter[12 + c], BY_LANES);
        const vf d = picked(quarter[c], quarter[4 + c], odd), e = picked(quarter[8 + c], quarter[12 + c], odd);
        rows[c] = picked(a, b, BY_LANES);
        rows[8 + c] = picked(a, b, odd);
        rows[4 + c] = picked(d, e, BY_LANES);
        rows[12 + c] = picked(d, e, odd);
#else
        rows[c] = picked(quarter[c], quarter[4 + c], BY_LANES);
        rows[4 + c] =
            picked(quarter[c], quarter[4 + c], [&](int l, int j) INLINE_LAMBDA { return BY_LANES(l, j) + 4; });
#endif
    }
}

// The sum by `add` of the elements that `order` picks and of those `apart` from them.
template <typename Order, typename Add>
INLINE vf added(vf a, vf b, Order&& order, int apart, Add&& add) {
    return add(picked(a, b, order), picked(a, b, [&](int l, int j) INLINE_LAMBDA { return order(l, j) + apart; }));
}

// Lane i of the result is what `add` makes of all lanes of rows[i]; in the order in which `transpose` goes.
template <typename Add>
INLINE vf reduce_rows(const vf (&rows)[W], Add&& add) {
    vf half[W / 2], quarter[W / 4];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) half[i] = added(rows[2 * i], rows[2 * i + 1], BY_ONES, 2, add);
#pragma GCC unroll 4
    for (int i = 0; i < W / 4; i++) quarter[i] = added(half[2 * i], half[2 * i + 1], BY_TWOS, 2, add);
    // Lane l of quarter[i] now holds what features 4 l to 4 l + 3 of rows 4 i to 4 i + 3 make.
#if defined(__AVX512F__)
    const vf low = added(quarter[0], quarter[1], BY_LANES, 4, add),
             high = added(quarter[2], quarter[3], BY_LANES, 4, add);
    return added(low, high, BY_LANES, 4, add);
#else
    return added(quarter[0], quarter[1], BY_LANES, 4, add);
#endif
}
#endif

// The sum of each row: lane i of the result is the sum over rows[i].
INLINE vf sums(const vf (&rows)[W]) {
    return reduce_rows(rows, [](vf a, vf b) INLINE_LAMBDA { return a + b; });
}
