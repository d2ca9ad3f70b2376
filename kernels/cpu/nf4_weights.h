// Codes of four-bit NormalFloat as they lie in tiles of 16 outputs, and the numbers that they stand for.
//
// A line holds eight inputs of 16 outputs, 32 bits each. Of two neighbouring inputs the first is in the high half of
// its byte, as bitsandbytes has them.
#pragma once

#include "simd.h"

// Inputs with one scale, and lines of 64 bytes that hold them for 16 outputs.
constexpr int NF4_BLOCK = 64;
constexpr int NF4_LINES = 8;

// Source: bitsandbytes, as `CODE` in nf4.py.
alignas(64) constexpr float NF4_CODE[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// The code's numbers, in registers where there are any for it.
class CodeTable {
   public:
    // The numbers of input i, from 0 to 7, of a line.
    INLINE vf look_up(vi line, int i) const {
        const int shift = 4 * (i ^ 1);
#if defined(__AVX512F__)
        // Only the low four bits of a lane count.
        return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(line >> shift), codes_);
#elif defined(__AVX2__)
        // The low three bits choose in each half, and the fourth one, as a sign, the half.
        const __m256i place = (__m256i)(line >> shift);
        const __m256 half = (__m256)(line << (28 - shift));
        return (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, place), _mm256_permutevar8x32_ps(high_, place),
                                    half);
#else
        vf found;
        for (int lane = 0; lane < W; lane++) found[lane] = NF4_CODE[(line[lane] >> shift) & 15];
        return found;
#endif
    }

   private:
#if defined(__AVX512F__)
    const __m512 codes_ = _mm512_load_ps(NF4_CODE);
#elif defined(__AVX2__)
    const __m256 low_ = _mm256_load_ps(NF4_CODE), high_ = _mm256_load_ps(NF4_CODE + 8);
#endif
};

struct Nf4Tiles {
    const uint8_t* values;  // [tiles][blocks][NF4_LINES][64]
    const float* scales;    // [tiles][blocks][16]
    long blocks;

    // A unit is W outputs: a tile, or part of one.
    INLINE vi line(long unit, long block, int line) const {
        vi v;
        std::memcpy(&v, values + (at(unit, block) * NF4_LINES + line) * 64 + unit % UNITS_PER_TILE * W * 4, sizeof v);
        return v;
    }

    INLINE vf scales_of(long unit, long block) const {
        return load(scales + at(unit, block) * 16 + unit % UNITS_PER_TILE * W);
    }

   private:
    static constexpr long UNITS_PER_TILE = 16 / W;
    INLINE long at(long unit, long block) const { return unit / UNITS_PER_TILE * blocks + block; }
};
