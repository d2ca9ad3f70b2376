// Rows of weights as they lie: float32, or bfloat16 and integers that become float32 on the way.
#pragma once

#include "simd.h"

INLINE vf load_weights(const float* from) { return load(from); }

// A bfloat16 is the upper half of a float32.
INLINE vf load_weights(const uint16_t* from) {
    using vh = uint16_t __attribute__((vector_size(2 * W)));
    vh halves;
    std::memcpy(&halves, from, sizeof halves);
    return bits(__builtin_convertvector(halves, vi) << 16);
}

INLINE vf load_weights(const int8_t* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    vi wide;
    for (int i = 0; i < W; i++) wide[i] = from[i];
    return __builtin_convertvector(wide, vf);
#endif
}

INLINE float load_weight(const float* from) { return *from; }

INLINE float load_weight(const uint16_t* from) {
    const uint32_t wide = static_cast<uint32_t>(*from) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// To the nearest, halves to even; a NaN stays one.
INLINE uint16_t to_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// W of them; `to` need not be aligned.
INLINE void store_bfloat16(vf values, void* to) {
    using vu = uint32_t __attribute__((vector_size(4 * W)));
    using vh = uint16_t __attribute__((vector_size(2 * W)));
    const vu wide = reinterpret_cast<vu>(values);
    const vu rounded = wide + 0x7fff + ((wide >> 16) & 1);
    const vh halves = __builtin_convertvector((values == values ? rounded : vu{} + 0x7fc00000) >> 16, vh);
    std::memcpy(to, &halves, sizeof halves);
}

// `count` weights as float32: where they lie, or widened into `to`.
INLINE const float* as_floats(const float* from, long, float*) { return from; }

inline const float* as_floats(const uint16_t* from, long count, float* to) {
    long i = 0;
    for (; i + W <= count; i += W) store(to + i, load_weights(from + i));
    for (; i < count; i++) to[i] = load_weight(from + i);
    return to;
}
