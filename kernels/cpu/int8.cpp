// y = x W^T with turned weights in int8, one scale an output, and turned activations in bytes, one scale a row.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "export.h"
#include "tiles.h"

namespace {

struct Turned {
    static constexpr int LINES = 8;
#if defined(__AVX512F__)
    static constexpr int VECTORS = 2, ROWS = 12;
#elif defined(__AVXVNNI__)
    static constexpr int VECTORS = 2, ROWS = 6;
#elif defined(__AVX2__)
    static constexpr int VECTORS = 1, ROWS = 11;
#else
    static constexpr int VECTORS = 2, ROWS = 4;
#endif
    // Of weights that each activation meets which is broadcast, and rows: as many sums as the registers hold beside them.
    // With AVX2 these are few, and loads are not what limits.
    static constexpr int STEPS = 2 / VECTORS * TILE_OUTPUTS / W;

    // R rows.
    struct Block {
        Bytes* bytes;   // [groups][R], plus BIAS
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
    const int32_t* zeros;  // [tiles][16]: the sums that a row of zeros gives, see `dot_biased`
    long groups;

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++)
            block.scales[row] = x.quantise_turned(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + BIAS, block.bytes[k / GROUP * rows + row] + k % GROUP);
            });
    }

    template <int R>
    __attribute__((noinline)) void multiply(const Block& block, long tile, long other, Next& next, Outputs* result,
                                            Outputs* others) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            if constexpr (VECTORS == 2) {
                const long tiles[] = {tile, other};
                Outputs* const results[] = {result, others};
                multiply<R>(block, tiles, from, next, results);
            } else {
                const long first[] = {tile}, second[] = {other};
                Outputs *const to_first[] = {result}, *const to_second[] = {others};
                multiply<R>(block, first, from, next, to_first);
                if (other != tile) multiply<R>(block, second, from, next, to_second);
            }
        }
    }

    // What a row of zeros gives, W outputs of a tile.
    vi of_zeros(long tile, int from) const {
        int8_t zero[4];
        std::memset(zero, BIAS, sizeof zero);
        vi total = {};
        for (long line = 0; line < groups * LINES; line++)
            total = dot_biased(total, four(zero), Biased(load_line(lines_of(tile, from) + line * 64)));
        return total;
    }

   private:
    static INLINE vi load_line(const int8_t* from) {
        vi v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }

    // Of W outputs of a tile.
    const int8_t* lines_of(long tile, int from) const { return values + tile * groups * LINES * 64 + from * 4; }

    // R rows times W outputs from `from` on of each of N tiles.
    template <int R, int N>
    INLINE void multiply(const Block& block, const long (&tiles)[N], int from, Next& next,
                         Outputs* const (&results)[N]) const {
        vi total[N][R];
        const int8_t* lines[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            lines[n] = lines_of(tiles[n], from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) total[n][r] = vi{};
        }
        const Bytes* rows = block.bytes;
        Next ahead = next;  // in registers
        for (long group = 0; group < groups; group++) {
            ahead.step();
#pragma GCC unroll 8
            for (int i = 0; i < LINES; i++) {
                const Biased w(load_line(lines[0] + i * 64)), v(load_line(lines[N - 1] + i * 64));
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const vi fours = four(rows[r] + 4 * i);
                    total[0][r] = dot_biased(total[0][r], fours, w);
                    if constexpr (N == 2) total[1][r] = dot_biased(total[1][r], fours, v);
                }
            }
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) lines[n] += LINES * 64;
            rows += R;
        }
        next = ahead;
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) finish<R>(block, tiles[n] * TILE_OUTPUTS + from, total[n], results[n], from);
    }

    template <int R>
    INLINE void finish(const Block& block, long output, const vi (&total)[R], Outputs* result, int from) const {
        vi zero;
        std::memcpy(&zero, zeros + output, sizeof zero);
        const vf scale = load(scales + output);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            store(result[r] + from, to_float(total[r] - zero) * (splat(block.scales[r]) * scale));
    }
};

}  // namespace

// As `eft_linear`, with weights [tiles, groups, 8, 64] int8, scales and zeros [tiles, 16] as `eft_int8_zeros` gives them,
// a tile being 16 outputs: the rest of the last one is zero. With `swiglu` out is a multiple of 16.
EXPORT void eft_linear_int8(const float* x, long stride, long rows, long in, long out, const int8_t* values,
                            const float* scales, const int32_t* zeros, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, int threads) {
    run_tiles(Linear{rows, in, out, bias, residual, y, swiglu != 0},
              Turned{{x, stride, in, norm, eps}, values, scales, zeros, (in + TURNED - 1) / TURNED * (TURNED / GROUP)}, threads);
}

// zeros [tiles, 16]: what this instruction set gives for a row of zeros, to be taken off the sums of every row.
EXPORT void eft_int8_zeros(const int8_t* values, long tiles, long groups, int32_t* zeros) {
    const Turned weight{{}, values, nullptr, nullptr, groups};
    for (long tile = 0; tile < tiles; tile++)
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            const vi total = weight.of_zeros(tile, from);
            std::memcpy(zeros + tile * TILE_OUTPUTS + from, &total, sizeof total);
        }
}
