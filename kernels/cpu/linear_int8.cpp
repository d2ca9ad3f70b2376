// y = x W^T with turned weights in int8, one scale an output, and turned activations in bytes, one scale a row.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "amx.h"
#include "export.h"
#include "tiles.h"

namespace {

constexpr bool NARROW_HELPS = TOGETHER > 1;
// Else weights are multiplied in one way, narrow or not.

// What was given, and what does not depend on how it is multiplied.
struct Turned {
    static constexpr int LINES = 8;

    Activations x;
    const int8_t* values;  // [tiles][groups][LINES][64]: line i holds inputs 4 i to 4 i + 3 of 16 outputs
    const float* scales;   // [tiles][16]
    const int32_t* zeros;  // [tiles][16]: the sums that a row of zeros gives, see `dot_biased`
    long groups;

    // Of W outputs of a tile.
    const int8_t* lines_of(long tile, int from) const { return values + tile * groups * LINES * 64 + from * 4; }

    // What a row of zeros gives, W outputs of a tile.
    template <bool NARROW>
    vi of_zeros(long tile, int from) const {
        int8_t zero[4 * TOGETHER];
        std::memset(zero, Biased<NARROW>::BIAS, sizeof zero);
        vi total = {};
        for (long line = 0; line < groups * LINES; line += TOGETHER)
            total = dot_biased(total, zero, Biased<NARROW>(lines_of(tile, from) + line * 64));
        return total;
    }

    // The sums of W outputs from `output` on as floats, for a row of that scale.
    struct Finish {
        vi zero;
        vf scale;

        INLINE vf operator()(vi total, float of_row) const { return to_float(total - zero) * (splat(of_row) * scale); }
    };

    INLINE Finish finish(long output) const {
        Finish found{{}, load(scales + output)};
        std::memcpy(&found.zero, zeros + output, sizeof found.zero);
        return found;
    }
};

#if defined(HAS_AMX)
// A block of up to two squares of rows times a square each of two tiles.
template <bool NARROW>
struct Format : Turned {
    using Session = Squares;
    static constexpr int STEPS = 1, ROWS = 2 * SQUARE_ROWS;

    static constexpr int squares(int rows) { return (rows + SQUARE_ROWS - 1) / SQUARE_ROWS; }

    struct Block {
        int8_t* bytes;  // [squares][groups / 2][SQUARE_ROWS][64], plus BIAS; what fills the last square is anything
        float* scales;  // [rows]

        static long size(long groups, int rows) {
            return squares(rows) * SQUARE * (groups / 2) + rows * static_cast<long>(sizeof(float));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<int8_t*>(memory)),
              scales(reinterpret_cast<float*>(bytes + squares(rows) * SQUARE * (groups / 2))) {}
    };

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++) {
            int8_t* to = block.bytes + row / SQUARE_ROWS * SQUARE * (groups / 2) + row % SQUARE_ROWS * 64;
            block.scales[row] = x.quantise_turned(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + Biased<NARROW>::BIAS, to + k / 64 * SQUARE + k % 64);
            });
        }
    }

    void multiply(int rows, const Block& block, long tile, long other, Next& next, Outputs* result,
                  Outputs* others) const {
        alignas(64) int32_t sums[2][ROWS][TILE_OUTPUTS];
        if (rows > SQUARE_ROWS)
            multiply<true>(block, tile, other, next, sums);
        else
            multiply<false>(block, tile, other, next, sums);
        write(rows, block, tile, sums[0], result);
        if (other != tile) write(rows, block, other, sums[1], others);
    }

   private:
    // `BOTH` squares of rows.
    template <bool BOTH>
    INLINE void multiply(const Block& block, long tile, long other, Next& next,
                         int32_t (&sums)[2][ROWS][TILE_OUTPUTS]) const {
        const int8_t *one = lines_of(tile, 0), *two = lines_of(other, 0), *rows = block.bytes;
        const long below = SQUARE * (groups / 2);
        Next ahead = next;
        Squares::clear<0>();
        Squares::clear<1>();
        Squares::clear<2>();
        Squares::clear<3>();
        for (long i = 0; i < groups / 2; i++, one += SQUARE, two += SQUARE, rows += SQUARE) {
            ahead.step();
            ahead.step();
            Squares::load<6>(one);
            Squares::load<4>(rows);
            Squares::multiply<0, 4, 6>();
            Squares::load<7>(two);
            Squares::multiply<1, 4, 7>();
            if constexpr (BOTH) {
                Squares::load<5>(rows + below);
                Squares::multiply<2, 5, 6>();
                Squares::multiply<3, 5, 7>();
            }
        }
        next = ahead;
        Squares::store<0>(sums[0]);
        Squares::store<1>(sums[1]);
        if constexpr (BOTH) {
            Squares::store<2>(sums[0] + SQUARE_ROWS);
            Squares::store<3>(sums[1] + SQUARE_ROWS);
        }
    }

    INLINE void write(int rows, const Block& block, long tile, const int32_t (*sums)[TILE_OUTPUTS],
                      Outputs* result) const {
        static_assert(TILE_OUTPUTS == W);
        const Finish finish = this->finish(tile * TILE_OUTPUTS);
        for (int r = 0; r < rows; r++) {
            vi total;
            std::memcpy(&total, sums[r], sizeof total);
            store(result[r], finish(total, block.scales[r]));
        }
    }
};
#else
template <bool NARROW>
struct Format : Turned {
    struct Session {};
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

    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++)
            block.scales[row] = x.quantise_turned(first + row, [&](vi q, long k) INLINE_LAMBDA {
                store_bytes(q + Biased<NARROW>::BIAS, block.bytes[k / GROUP * rows + row] + k % GROUP);
            });
    }

    template <int R = ROWS>
    void multiply(int rows, const Block& block, long tile, long other, Next& next, Outputs* result,
                  Outputs* others) const {
        if (rows == R) return multiply_rows<R>(block, tile, other, next, result, others);
        if constexpr (R > 1) multiply<R - 1>(rows, block, tile, other, next, result, others);
    }

   private:
    template <int R>
    __attribute__((noinline)) void multiply_rows(const Block& block, long tile, long other, Next& next, Outputs* result,
                                                 Outputs* others) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            if constexpr (VECTORS == 2) {
                const long tiles[] = {tile, other};
                Outputs* const results[] = {result, others};
                multiply_vectors<R>(block, tiles, from, next, results);
            } else {
                const long first[] = {tile}, second[] = {other};
                Outputs *const to_first[] = {result}, *const to_second[] = {others};
                multiply_vectors<R>(block, first, from, next, to_first);
                if (other != tile) multiply_vectors<R>(block, second, from, next, to_second);
            }
        }
    }

    // R rows times W outputs from `from` on of each of N tiles.
    template <int R, int N>
    INLINE void multiply_vectors(const Block& block, const long (&tiles)[N], int from, Next& next,
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
            for (int i = 0; i < LINES; i += TOGETHER) {
                const Biased<NARROW> w(lines[0] + i * 64), v(lines[N - 1] + i * 64);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const int8_t* x = rows[r] + 4 * i;
                    total[0][r] = dot_biased(total[0][r], x, w);
                    if constexpr (N == 2) total[1][r] = dot_biased(total[1][r], x, v);
                }
            }
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) lines[n] += LINES * 64;
            rows += R;
        }
        next = ahead;
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            const Finish finish = this->finish(tiles[n] * TILE_OUTPUTS + from);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) store(results[n][r] + from, finish(total[n][r], block.scales[r]));
        }
    }
};
#endif

template <bool NARROW>
void run(const Linear& op, const Activations& x, const int8_t* values, const float* scales, const int32_t* zeros,
         int threads) {
    const long groups = (x.in + TURNED - 1) / TURNED * (TURNED / GROUP);
    run_tiles(op, Format<NARROW && NARROW_HELPS>{{x, values, scales, zeros, groups}}, threads);
}

template <bool NARROW>
void add_zeros(const int8_t* values, long tiles, long groups, int32_t* zeros) {
    const Turned weight{{}, values, nullptr, nullptr, groups};
    for (long tile = 0; tile < tiles; tile++)
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            const vi total = weight.of_zeros<NARROW>(tile, from);
            std::memcpy(zeros + tile * TILE_OUTPUTS + from, &total, sizeof total);
        }
}

}  // namespace

// As `eft_linear`, with weights [tiles, groups, 8, 64] int8, scales and zeros [tiles, 16] as `eft_int8_zeros` gives them,
// a tile being 16 outputs: the rest of the last one is zero. With `swiglu` out is a multiple of 16.
EXPORT void eft_linear_int8(const float* x, long stride, long rows, long in, long out, const int8_t* values,
                            const float* scales, const int32_t* zeros, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, int threads) {
    run<false>({rows, in, out, bias, residual, y, swiglu != 0}, {x, stride, in, norm, eps}, values, scales, zeros, threads);
}

// The same with weights that are narrow (`quantise_narrow_int8` in `kernels/quantised.py`).
EXPORT void eft_linear_int8_narrow(const float* x, long stride, long rows, long in, long out, const int8_t* values,
                                   const float* scales, const int32_t* zeros, const float* bias, const float* norm,
                                   float eps, const float* residual, float* y, int swiglu, int threads) {
    run<true>({rows, in, out, bias, residual, y, swiglu != 0}, {x, stride, in, norm, eps}, values, scales, zeros, threads);
}

// zeros [tiles, 16]: what this instruction set gives for a row of zeros, to be taken off the sums of every row.
EXPORT void eft_int8_zeros(const int8_t* values, long tiles, long groups, int32_t* zeros, int narrow) {
    narrow ? add_zeros<true>(values, tiles, groups, zeros) : add_zeros<false>(values, tiles, groups, zeros);
}
