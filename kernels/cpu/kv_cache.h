// Heads of the KV cache as they are stored, read straight into registers: some features of one token, or the same
// feature of W tokens.
#pragma once

#include "attention.h"
#include "bfloat16.h"

// Features in 32 bits.
template <int TYPE>
constexpr int VALUES_PER_LANE = TYPE == FLOAT32    ? 1
                                : TYPE == BFLOAT16 ? 2
                                                   : 4;
// Features that are read at once, whose sums of values lie together.
template <int TYPE>
constexpr int RUN_FEATURES = TYPE == BFLOAT16 ? 2 * W : W;

// Bytes of one feature.
template <int TYPE>
constexpr long FEATURE_BYTES = 4 / VALUES_PER_LANE<TYPE>;

// Feature `i` of those in 32 bits, without an int8 head's scale.
template <int TYPE>
INLINE vf unpacked(vi packed, int i) {
    if constexpr (TYPE == FLOAT32) return bits(packed);
    if constexpr (TYPE == BFLOAT16) return bits(i == 0 ? packed << 16 : packed & splat(-65536));
    return __builtin_convertvector((i == 3 ? packed : packed << (24 - 8 * i)) >> 24, vf);
}

// RUN_FEATURES features of one token, in the order in which the sums of values are kept: of bfloat16 those at even
// places, then those at odd ones, which takes no shuffling.
template <int TYPE>
INLINE void load_run(const char* from, vf (&to)[RUN_FEATURES<TYPE> / W]) {
    if constexpr (TYPE == INT8) {
        using vb = int8_t __attribute__((vector_size(W)));
        vb bytes;
        std::memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX512F__)
        to[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
        to[0] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes)));
#else
        to[0] = __builtin_convertvector(bytes, vf);
#endif
    } else {
        vi packed;
        std::memcpy(&packed, from, sizeof packed);
        for (int i = 0; i < RUN_FEATURES<TYPE> / W; i++) to[i] = unpacked<TYPE>(packed, i);
    }
}

#if defined(__AVX512F__)
#define OF_LANES(name, a, b) ((vf)_mm512_##name((__m512)(a), (__m512)(b)))
#define PAIRS_OF_LANES(name, a, b) ((vf)_mm512_##name((__m512d)(a), (__m512d)(b)))
#elif defined(__AVX__)
#define OF_LANES(name, a, b) ((vf)_mm256_##name((__m256)(a), (__m256)(b)))
#define PAIRS_OF_LANES(name, a, b) ((vf)_mm256_##name((__m256d)(a), (__m256d)(b)))
#endif

#if defined(__AVX__)
// In every 128 bits: rows[i][j] becomes rows[j][i].
INLINE void transpose_lanes(vf (&rows)[4]) {
    const vf a = OF_LANES(unpacklo_ps, rows[0], rows[1]), b = OF_LANES(unpackhi_ps, rows[0], rows[1]);
    const vf c = OF_LANES(unpacklo_ps, rows[2], rows[3]), d = OF_LANES(unpackhi_ps, rows[2], rows[3]);
    rows[0] = PAIRS_OF_LANES(unpacklo_pd, a, c);
    rows[1] = PAIRS_OF_LANES(unpackhi_pd, a, c);
    rows[2] = PAIRS_OF_LANES(unpacklo_pd, b, d);
    rows[3] = PAIRS_OF_LANES(unpackhi_pd, b, d);
}

// Half a vector of row `a`, then half a vector of row `b`: loading the second half takes no shuffle.
INLINE vf halves(const char* a, const char* b) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
    return (vf)_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)b), 1);
#else
    return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float*)a)),
                                    _mm_loadu_ps((const float*)b), 1);
#endif
}
#endif

// Half a vector of 32 bits each of W rows, transposed: `to[i]` holds those at place i. Row r is at `from` + offsets[r].
// TRANSPOSED is the number of 32-bit places of each row that are loaded at once.
#if defined(__AVX__)
constexpr int TRANSPOSED = W / 2;

INLINE void load_transposed(const char* from, const long* offsets, vi (&to)[TRANSPOSED]) {
    vf rows[W / 8][4];
#pragma GCC unroll 2
    for (int quad = 0; quad < W / 8; quad++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            rows[quad][i] = halves(from + offsets[8 * quad + i], from + offsets[8 * quad + 4 + i]);
        transpose_lanes(rows[quad]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
        to[i] = (vi)_mm512_shuffle_f32x4((__m512)rows[0][i], (__m512)rows[1][i], 0x88);
        to[4 + i] = (vi)_mm512_shuffle_f32x4((__m512)rows[0][i], (__m512)rows[1][i], 0xdd);
#else
        to[i] = bits(rows[0][i]);
#endif
    }
}
#else
constexpr int TRANSPOSED = W;

INLINE void load_transposed(const char* from, const long* offsets, vi (&to)[TRANSPOSED]) {
    vf rows[W];
    for (int i = 0; i < W; i++) std::memcpy(&rows[i], from + offsets[i], sizeof rows[i]);
    transpose(rows);
    for (int i = 0; i < W; i++) to[i] = bits(rows[i]);
}
#endif

// Features that `load_transposed` loads.
template <int TYPE>
constexpr int WINDOW_FEATURES = TRANSPOSED * VALUES_PER_LANE<TYPE>;
