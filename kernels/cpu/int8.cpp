// y = x W^T with turned weights in int8, one scale an output, and turned activations in bytes, one scale a row.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "export.h"
#include "tiles.h"

namespace {

struct Turned {
    static constexpr int LINES = 8;

    // R rows.
    struct Block {
        Bytes* bytes;   // [groups][R], plus OFFSET
        float* scales;  // [R]

        static long size(long groups, int rows) {
            return rows * (groups * static_cast<long>(sizeof(Bytes)) + static_cast<long>(sizeof(float)));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<Bytes*>(memory)), scales(reinterpret_cast<float*>(bytes + groups * rows)) {}
    };

    Activations x;
    const int8_t* values;  // [tiles][groups][LINES][64]: line i holds inputs 4 i to 4 i + 3 of 16 outputs
    const float* scales;   // [tiles][16]
    const int32_t* sums;   // [tiles][16]: of each output's weights
    long groups;

    long tile_bytes() const { return groups * LINES * 64; }

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++)
            block.scales[row] = x.quantise_turned(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + OFFSET, block.bytes[k / GROUP * rows + row] + k % GROUP);
            });
    }

    // Both tiles at once: each activation that is broadcast meets two vectors of weights.
    template <int R>
    __attribute__((noinline)) void multiply(const Block& block, long tile, long other, Outputs* result,
                                            Outputs* others) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            vi total[2][R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) total[0][r] = total[1][r] = vi{};
            const int8_t* lines = values + tile * tile_bytes() + from * 4;
            const int8_t* other_lines = values + other * tile_bytes() + from * 4;
            const Bytes* rows = block.bytes;
            for (long group = 0; group < groups; group++) {
#pragma GCC unroll 8
                for (int i = 0; i < LINES; i++) {
                    const Fours w(load_line(lines + i * 64)), v(load_line(other_lines + i * 64));
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        const vi fours = four(rows[r] + 4 * i);
                        total[0][r] = dot4(total[0][r], fours, w);
                        total[1][r] = dot4(total[1][r], fours, v);
                    }
                }
                lines += LINES * 64;
                other_lines += LINES * 64;
                rows += R;
            }
            finish<R>(block, tile * TILE_OUTPUTS + from, total[0], result, from);
            finish<R>(block, other * TILE_OUTPUTS + from, total[1], others, from);
        }
    }

   private:
    static INLINE vi load_line(const int8_t* from) {
        vi v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }

    template <int R>
    INLINE void finish(const Block& block, long output, const vi (&total)[R], Outputs* result, int from) const {
        vi correction;
        std::memcpy(&correction, sums + output, sizeof correction);
        correction = correction * splat(OFFSET);
        const vf scale = load(scales + output);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            store(result[r] + from, to_float(total[r] - correction) * (splat(block.scales[r]) * scale));
    }
};

}  // namespace

// As `eft_linear`, with weights [tiles, groups, 8, 64] int8, scales and the sums of the weights' rows [tiles, 16], a tile
// being 16 outputs: the rest of the last one is zero. With `swiglu` out is a multiple of 16.
EXPORT void eft_linear_int8(const float* x, long stride, long rows, long in, long out, const int8_t* values,
                            const float* scales, const int32_t* sums, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, int threads) {
    run_tiles(Linear{rows, in, out, bias, residual, y, swiglu != 0},
              Turned{{x, stride, in, norm, eps}, values, scales, sums, (in + TURNED - 1) / TURNED * (TURNED / GROUP)}, threads);
}
