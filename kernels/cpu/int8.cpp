// y = x W^T with weights in int8, one scale an output, and activations in two bytes.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "export.h"
#include "tiles.h"

namespace {

struct Outputs {
    static constexpr int OFFSET = ::OFFSET;
    static constexpr int LINES = 8;

    Activations x;
    const int8_t* values;  // [tiles][groups][LINES][64]: line i holds inputs 4 i to 4 i + 3 of 16 outputs
    const float* scales;   // [tiles][16]
    const int32_t* sums;   // [tiles][16]: of each output's weights
    long groups;

    long tile_bytes() const { return groups * LINES * 64; }

    template <int R>
    __attribute__((noinline)) void multiply(const Block& block, long tile, float (*result)[TILE_OUTPUTS]) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            vi high[R], low[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) high[r] = low[r] = vi{};
            for (long group = 0; group < groups; group++) {
                const int8_t* lines = values + (tile * groups + group) * LINES * 64 + from * 4;
                const Bytes* rows = block.bytes + group * R;
#pragma GCC unroll 8
                for (int i = 0; i < LINES; i++) {
                    vi w;
                    std::memcpy(&w, lines + i * 64, sizeof w);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        high[r] = dot4(high[r], four(rows[r].high + 4 * i), w);
                        low[r] = dot4(low[r], four(rows[r].low + 4 * i), w);
                    }
                }
            }
            vi correction;
            std::memcpy(&correction, sums + tile * TILE_OUTPUTS + from, sizeof correction);
            correction = correction * splat(static_cast<int32_t>(OFFSET));
            const vf scale = load(scales + tile * TILE_OUTPUTS + from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const vf total = to_float(high[r] - correction) * splat(256.0f) + to_float(low[r] - correction);
                store(result[r] + from, total * (splat(block.scales[r]) * scale));
            }
        }
    }
};

}  // namespace

// As `eft_linear`, with weights [tiles, groups, 8, 64] int8, scales and the sums of the weights' rows [tiles, 16], a tile
// being 16 outputs: the rest of the last one is zero. With `swiglu` out is a multiple of 16.
EXPORT void eft_linear_int8(const float* x, long stride, long rows, long in, long out, const int8_t* values,
                            const float* scales, const int32_t* sums, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, int threads) {
    run_tiles(Linear{rows, in, out, bias, residual, y, swiglu != 0},
              Outputs{{x, stride, in, norm, eps}, values, scales, sums, (in + GROUP - 1) / GROUP}, threads);
}
