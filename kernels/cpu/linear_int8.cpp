// y = x W^T with rotated weights in int8, one scale an output, and rotated activations in bytes, one scale a row.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "amx.h"
#include "exports.h"
#include "tile_gemm.h"

namespace {

// True if narrow weights are multiplied in a faster way of their own on this instruction set.
constexpr bool HAS_NARROW_KERNEL = LINES_PER_DOT > 1;

// Activations and weights, and what does not depend on how they are multiplied.
struct Int8Weights {
    static constexpr int LINES = 8;

    ActivationQuantiser x;
    const int8_t* values;  // [tiles][groups][LINES][64]: line i holds inputs 4 i to 4 i + 3 of 16 outputs
    const float* scales;   // [tiles][16]
    const int32_t* zero_sums;  // [tiles][16]: the sums that a row of zeros gives, see `dot_zero_point`
    long groups;

    // Lines of W outputs of a tile.
    const int8_t* lines_of(long tile, int from) const { return values + tile * groups * LINES * 64 + from * 4; }

    // The sums that a row of zeros gives, for W outputs of a tile.
    template <bool NARROW>
    vi zero_sums_of(long tile, int from) const {
        int8_t zero[4 * LINES_PER_DOT];
        std::memset(zero, ZeroPointWeights<NARROW>::ZERO_POINT, sizeof zero);
        vi total = {};
        for (long line = 0; line < groups * LINES; line += LINES_PER_DOT)
            total = dot_zero_point(total, zero, ZeroPointWeights<NARROW>(lines_of(tile, from) + line * 64));
        return total;
    }

    // The sums of W outputs from `output` on as floats, for a row of that scale.
    struct Dequantiser {
        vi zero;
        vf scale;

        INLINE vf operator()(vi total, float of_row) const { return to_float(total - zero) * (splat(of_row) * scale); }
    };

    INLINE Dequantiser dequantiser(long output) const {
        Dequantiser found{{}, load(scales + output)};
        std::memcpy(&found.zero, zero_sums + output, sizeof found.zero);
        return found;
    }
};

#if defined(HAS_AMX)
// A block of up to two AMX tiles of rows times an AMX tile each of two tiles of weights.
template <bool NARROW>
struct Format : Int8Weights {
    using Session = AmxTiles;
    static constexpr int STEPS = 1, ROWS = 2 * AMX_TILE_ROWS;

    static constexpr int num_amx_tiles(int rows) { return (rows + AMX_TILE_ROWS - 1) / AMX_TILE_ROWS; }

    struct Block {
        int8_t* bytes;  // [AMX tiles][groups / 2][AMX_TILE_ROWS][64], plus ZERO_POINT; what fills the last is anything
        float* scales;  // [rows]

        static long size(long groups, int rows) {
            return num_amx_tiles(rows) * AMX_TILE_BYTES * (groups / 2) + rows * static_cast<long>(sizeof(float));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<int8_t*>(memory)),
              scales(reinterpret_cast<float*>(bytes + num_amx_tiles(rows) * AMX_TILE_BYTES * (groups / 2))) {}
    };

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++) {
            int8_t* to = block.bytes + row / AMX_TILE_ROWS * AMX_TILE_BYTES * (groups / 2) + row % AMX_TILE_ROWS * 64;
            block.scales[row] = x.quantise_rotated(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + ZeroPointWeights<NARROW>::ZERO_POINT, to + k / 64 * AMX_TILE_BYTES + k % 64);
            });
        }
    }

    void multiply(int rows, const Block& block, long tile, long other, TilePrefetcher& next, TileOutputs* result,
                  TileOutputs* others) const {
        alignas(64) int32_t sums[2][ROWS][TILE_OUTPUTS];
        if (rows > AMX_TILE_ROWS)
            multiply<true>(block, tile, other, next, sums);
        else
            multiply<false>(block, tile, other, next, sums);
        write(rows, block, tile, sums[0], result);
        if (other != tile) write(rows, block, other, sums[1], others);
    }

   private:
    // With `BOTH` two AMX tiles of rows, else one.
    template <bool BOTH>
    INLINE void multiply(const Block& block, long tile, long other, TilePrefetcher& next,
                         int32_t (&sums)[2][ROWS][TILE_OUTPUTS]) const {
        const int8_t *one = lines_of(tile, 0), *two = lines_of(other, 0), *rows = block.bytes;
        const long below = AMX_TILE_BYTES * (groups / 2);
        TilePrefetcher ahead = next;
        AmxTiles::clear<0>();
        AmxTiles::clear<1>();
        AmxTiles::clear<2>();
        AmxTiles::clear<3>();
        for (long i = 0; i < groups / 2; i++, one += AMX_TILE_BYTES, two += AMX_TILE_BYTES, rows += AMX_TILE_BYTES) {
            ahead.step();
            ahead.step();
            AmxTiles::load<6>(one);
            AmxTiles::load<4>(rows);
            AmxTiles::multiply<0, 4, 6>();
            AmxTiles::load<7>(two);
            AmxTiles::multiply<1, 4, 7>();
            if constexpr (BOTH) {
                AmxTiles::load<5>(rows + below);
                AmxTiles::multiply<2, 5, 6>();
                AmxTiles::multiply<3, 5, 7>();
            }
        }
        next = ahead;
        AmxTiles::store<0>(sums[0]);
        AmxTiles::store<1>(sums[1]);
        if constexpr (BOTH) {
            AmxTiles::store<2>(sums[0] + AMX_TILE_ROWS);
            AmxTiles::store<3>(sums[1] + AMX_TILE_ROWS);
        }
    }

    INLINE void write(int rows, const Block& block, long tile, const int32_t (*sums)[TILE_OUTPUTS],
                      TileOutputs* result) const {
        static_assert(TILE_OUTPUTS == W);
        const Dequantiser dequantiser = this->dequantiser(tile * TILE_OUTPUTS);
        for (int r = 0; r < rows; r++) {
            vi total;
            std::memcpy(&total, sums[r], sizeof total);
            store(result[r], dequantiser(total, block.scales[r]));
        }
    }
};
#else
template <bool NARROW>
struct Format : Int8Weights {
    struct Session {};
    // Vectors of weights that each broadcast activation is multiplied with, and rows: as many sums as the registers
    // hold beside them. With AVX2 these are few, and loads are not the limit.
#if defined(__AVX512VNNI__)
    static constexpr int VECTORS = 2, ROWS = 12;
#elif defined(__AVX512F__)
    static constexpr int VECTORS = 2, ROWS = 9;
#elif defined(__AVXVNNI__)
    static constexpr int VECTORS = 2, ROWS = 6;
#elif defined(__AVX2__)
    static constexpr int VECTORS = NARROW ? 2 : 1, ROWS = NARROW ? 4 : 9;
#else
    static constexpr int VECTORS = 2, ROWS = 4;
#endif
    static constexpr int STEPS = 2 / VECTORS * TILE_OUTPUTS / W;

    // R rows.
    struct Block {
        Int8Group* bytes;  // [groups][R], plus ZERO_POINT
        float* scales;  // [R]

        static long size(long groups, int rows) {
            return rows * (groups * static_cast<long>(sizeof(Int8Group)) + static_cast<long>(sizeof(float)));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<Int8Group*>(memory)), scales(reinterpret_cast<float*>(bytes + groups * rows)) {}
    };

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++)
            block.scales[row] = x.quantise_rotated(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + ZeroPointWeights<NARROW>::ZERO_POINT, block.bytes[k / GROUP * rows + row] + k % GROUP);
            });
    }

    template <int R = ROWS>
    void multiply(int rows, const Block& block, long tile, long other, TilePrefetcher& next, TileOutputs* result,
                  TileOutputs* others) const {
        if (rows == R) return multiply_rows<R>(block, tile, other, next, result, others);
        if constexpr (R > 1) multiply<R - 1>(rows, block, tile, other, next, result, others);
    }

   private:
    template <int R>
    __attribute__((noinline)) void multiply_rows(const Block& block, long tile, long other, TilePrefetcher& next,
                                                 TileOutputs* result, TileOutputs* others) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            if constexpr (VECTORS == 2) {
                const long tiles[] = {tile, other};
                TileOutputs* const results[] = {result, others};
                multiply_vectors<R>(block, tiles, from, next, results);
            } else {
                const long first[] = {tile}, second[] = {other};
                TileOutputs *const to_first[] = {result}, *const to_second[] = {others};
                multiply_vectors<R>(block, first, from, next, to_first);
                if (other != tile) multiply_vectors<R>(block, second, from, next, to_second);
            }
        }
    }

    // R rows times W outputs from `from` on of each of N tiles.
    template <int R, int N>
    INLINE void multiply_vectors(const Block& block, const long (&tiles)[N], int from, TilePrefetcher& next,
                                 TileOutputs* const (&results)[N]) const {
        vi total[N][R];
        const int8_t* lines[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            lines[n] = lines_of(tiles[n], from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) total[n][r] = vi{};
        }
        const Int8Group* rows = block.bytes;
        TilePrefetcher ahead = next;  // in registers
        for (long group = 0; group < groups; group++) {
            ahead.step();
#pragma GCC unroll 8
            for (int i = 0; i < LINES; i += LINES_PER_DOT) {
                const ZeroPointWeights<NARROW> w(lines[0] + i * 64), v(lines[N - 1] + i * 64);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const int8_t* x = rows[r] + 4 * i;
                    total[0][r] = dot_zero_point(total[0][r], x, w);
                    if constexpr (N == 2) total[1][r] = dot_zero_point(total[1][r], x, v);
                }
            }
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) lines[n] += LINES * 64;
            rows += R;
        }
        next = ahead;
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            const Dequantiser dequantiser = this->dequantiser(tiles[n] * TILE_OUTPUTS + from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) store(results[n][r] + from, dequantiser(total[n][r], block.scales[r]));
        }
    }
};
#endif

template <bool NARROW>
void run(const GemmProblem& op, const ActivationQuantiser& x, const void* values, const void* scales,
         const void* zero_sums, int threads) {
    const long groups = (x.in + HADAMARD_SIZE - 1) / HADAMARD_SIZE * (HADAMARD_SIZE / GROUP);
    run_tiles(op,
              Format < NARROW &&
                  HAS_NARROW_KERNEL > {{x, static_cast<const int8_t*>(values), static_cast<const float*>(scales),
                                        static_cast<const int32_t*>(zero_sums), groups}},
              threads);
}

template <bool NARROW>
void write_zero_sums(const int8_t* values, long tiles, long groups, int32_t* zero_sums) {
    const Int8Weights weight{{}, values, nullptr, nullptr, groups};
    for (long tile = 0; tile < tiles; tile++)
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            const vi total = weight.zero_sums_of<NARROW>(tile, from);
            std::memcpy(zero_sums + tile * TILE_OUTPUTS + from, &total, sizeof total);
        }
}

}  // namespace

void eft_linear_int8(const float* x, long x_stride, long rows, long in, long out, const void* values,
                     const void* scales, const void* zero_sums, const float* bias, const float* norm, float eps,
                     const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run<false>({rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
               {x, x_stride, in, norm, eps}, values, scales, zero_sums, threads);
}

void eft_linear_int8_narrow(const float* x, long x_stride, long rows, long in, long out, const void* values,
                            const void* scales, const void* zero_sums, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run<true>({rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
               {x, x_stride, in, norm, eps}, values, scales, zero_sums, threads);
}

void eft_int8_zero_sums(const int8_t* values, long tiles, long groups, int32_t* zero_sums, int narrow) {
    narrow ? write_zero_sums<true>(values, tiles, groups, zero_sums)
           : write_zero_sums<false>(values, tiles, groups, zero_sums);
}
