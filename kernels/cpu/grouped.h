// Weights in groups of 32 inputs, each with a scale, and activations with a scale a group too: a group's sum is exact in
// integers, and over the groups they are added in float, from the first to the last.
//
// A `Kind` says what a group is:
//   static constexpr bool MINIMUMS         whether it has a minimum beside its scale
//   static constexpr int LINES             lines of 64 bytes of 16 outputs
//   using Sum; static Sum sum(int32_t of_activations, float scale)               what `dot` and the minimum need
//   static void unpack(const uint8_t* lines, Weights& w)                         the W outputs at the lines' beginning
//   template <int R> static void dot(const Weights&, const Bytes*, const Sum*, vi (&total)[R])
#pragma once

#include "tiles.h"

// W float16 as float32. Source: multiplying by 2^112 moves the exponent, of subnormals too.
INLINE vf load_half(const uint16_t* from) {
    using vh = uint16_t __attribute__((vector_size(2 * W)));
    vh halves;
    std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)halves);
#else
    const vi wide = __builtin_convertvector(halves, vi);
    return bits(((wide & 0x7fff) << 13) | ((wide & 0x8000) << 16)) * splat(0x1p112f);
#endif
}

template <typename Kind>
struct Grouped {
    using Sum = typename Kind::Sum;

    // R rows: [groups][R] of all that a product reads.
    struct Block {
        Bytes* bytes;
        float* scales;
        Sum* sums;

        static long size(long groups, int rows) {
            return rows * groups * static_cast<long>(sizeof(Bytes) + sizeof(float) + sizeof(Sum));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<Bytes*>(memory)),
              scales(reinterpret_cast<float*>(bytes + groups * rows)),
              sums(reinterpret_cast<Sum*>(scales + groups * rows)) {}
    };

    Activations x;
    const uint8_t* values;     // [tiles][groups][LINES][64]
    const uint16_t* scales;    // [tiles][groups][16] float16
    const uint16_t* minimums;  // as scales, or null
    long groups;

    long tile_bytes() const { return groups * Kind::LINES * 64; }

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++) {
            vi total = {};
            x.quantise_groups(first + row, [&](vi q, long group, int at, float scale) INLINE_LAMBDA {
                const long place = group * rows + row;
                store_bytes(q, block.bytes[place] + at);
                total = at == 0 ? q : total + q;
                if (at + W < GROUP) return;
                block.scales[place] = scale;
                block.sums[place] = Kind::sum(sum(total), scale);
            });
        }
    }

    template <int R>
    void multiply(const Block& block, long tile, long other, Outputs* result, Outputs* others) const {
        multiply<R>(block, tile, result);
        if (other != tile) multiply<R>(block, other, others);
    }

   private:
    template <int R>
    __attribute__((noinline)) void multiply(const Block& block, long tile, Outputs* result) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            vf acc[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r] = vf{};
            for (long group = 0; group < groups; group++) {
                const long at = tile * groups + group;
                Weights w;
                Kind::unpack(values + at * Kind::LINES * 64 + from * 4, w);
                const vf scale = load_half(scales + at * TILE_OUTPUTS + from);
                const float* steps = block.scales + group * R;
                const Sum* sums = block.sums + group * R;
                vi total[R];
                Kind::template dot<R>(w, block.bytes + group * R, sums, total);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) acc[r] = fused(to_float(total[r]), scale * splat(steps[r]), acc[r]);
                if constexpr (Kind::MINIMUMS) {
                    const vf minimum = load_half(minimums + at * TILE_OUTPUTS + from);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) acc[r] = fused(minimum, splat(sums[r]), acc[r]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) store(result[r] + from, acc[r]);
        }
    }
};
