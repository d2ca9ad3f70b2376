// Linears whose weights lie in tiles of 16 outputs and 32 inputs, the groups of one scale.
//
// A vector holds the same inputs of W outputs, and activations are broadcast: so one row reads the weights at the
// speed of memory, and many rows share what was unpacked. A group's sum is of integers, exact; over the groups they
// are added in float, from the first to the last. So a row's result is the same bit by bit in every batch.
//
// A `Format` says what a tile is:
//   static constexpr bool MINIMUMS         whether a group has a minimum beside its scale
//   static constexpr int LINES             lines of 64 bytes in a tile
//   static void unpack(const uint8_t* lines, Weights& w)                         the W outputs at the lines' beginning
//   template <int R> static void dot(const Weights&, const Bytes*, const int32_t* sums, vi (&total)[R])
#pragma once

#include "activations.h"
#include "linear.h"
#include "tile_dots.h"

constexpr int TILE_OUTPUTS = 16;

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 10;
#else
constexpr int MOST_ROWS = 4;
#endif
// Rows that are computed at once: as many sums as the registers hold beside a tile's weights.

// R rows, quantised: [groups][R] of what each product reads.
struct Block {
    Bytes* bytes;
    int32_t* sums;  // of a group's activations
    float* scales;  // [R]

    static long size(long groups, int rows) {
        return rows * (groups * static_cast<long>(sizeof(Bytes) + sizeof(int32_t)) + static_cast<long>(sizeof(float)));
    }

    Block(char* memory, long groups, int rows)
        : bytes(reinterpret_cast<Bytes*>(memory)),
          sums(reinterpret_cast<int32_t*>(memory + rows * groups * static_cast<long>(sizeof(Bytes)))),
          scales(reinterpret_cast<float*>(sums + rows * groups)) {}

    void pack(const Activations& x, long first, long groups, int rows) {
        for (int row = 0; row < rows; row++) {
            std::memset(&bytes[(groups - 1) * rows + row], 0, sizeof(Bytes));
            for (long group = 0; group < groups; group++) sums[group * rows + row] = 0;
            scales[row] = x.quantise(first + row, [&](vi q, long k) INLINE_LAMBDA {
                const vi high = (q + 128) >> 8;
                const long at = k / GROUP * rows + row;
                store_bytes(high, bytes[at].high + k % GROUP);
                store_bytes(q - (high << 8), bytes[at].low + k % GROUP);
                int32_t total = 0;
                for (int i = 0; i < W; i++) total += q[i];
                sums[at] += total;
            });
        }
    }

    static INLINE void store_bytes(vi q, int8_t* to) {
        const vb narrow = __builtin_convertvector(q, vb);
        std::memcpy(to, &narrow, sizeof narrow);
    }
};

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

template <typename Format>
struct Tiles {
    Activations x;
    const uint8_t* values;     // [tiles][groups][LINES][64]
    const uint16_t* scales;    // [tiles][groups][16] float16
    const uint16_t* minimums;  // as scales, or null
    long groups;

    // R rows times the 16 outputs of a tile.
    template <int R>
    __attribute__((noinline)) void multiply(const Block& block, long tile, float (*result)[TILE_OUTPUTS]) const {
#pragma GCC unroll 1
        for (int from = 0; from < TILE_OUTPUTS; from += W) {
            vf acc[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r] = vf{};
            for (long group = 0; group < groups; group++) {
                const long at = tile * groups + group;
                Weights w;
                Format::unpack(values + at * Format::LINES * 64 + from * 4, w);
                const vf scale = load_half(scales + at * TILE_OUTPUTS + from);
                const Bytes* rows = block.bytes + group * R;
                const int32_t* sums = block.sums + group * R;
                vi total[R];
                Format::template dot<R>(w, rows, sums, total);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) acc[r] += scale * to_float(total[r]);
                if constexpr (Format::MINIMUMS) {
                    const vf minimum = load_half(minimums + at * TILE_OUTPUTS + from);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) acc[r] += minimum * to_float(splat(sums[r]));
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) store(result[r] + from, acc[r] * splat(block.scales[r]));
        }
    }

    template <int R = MOST_ROWS>
    void multiply(int rows, const Block& block, long tile, float (*result)[TILE_OUTPUTS]) const {
        if (rows == R) return multiply<R>(block, tile, result);
        if constexpr (R > 1) multiply<R - 1>(rows, block, tile, result);
    }
};

// What becomes of W outputs of one row from n on; `up` is what the weight's second half gave, with `op.swiglu`.
INLINE vf finished(const Linear& op, long row, long n, vf value, vf up) {
    if (op.bias) value += load(op.bias + n);
    if (op.swiglu) {
        if (op.bias) up += load(op.bias + op.out + n);
        value = silu(value) * up;
    }
    return op.residual ? load(op.residual + row * op.out + n) + value : value;
}

// Writes the outputs of a tile: with `op.swiglu` of the tile of gates and the one of ups.
INLINE void finish_tile(const Linear& op, int rows, long row, long tile, const float (*result)[TILE_OUTPUTS],
                        const float (*ups)[TILE_OUTPUTS]) {
    const long n = tile * TILE_OUTPUTS;
    if (n + TILE_OUTPUTS <= op.out) {
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < TILE_OUTPUTS; i += W)
                store(op.y + (row + r) * op.out + n + i,
                      finished(op, row + r, n + i, load(result[r] + i), op.swiglu ? load(ups[r] + i) : vf{}));
        return;
    }
    for (int r = 0; r < rows; r++)
        for (long i = 0; n + i < op.out; i++) {
            const long at = (row + r) * op.out + n + i;
            const float value = result[r][i] + (op.bias ? op.bias[n + i] : 0.0f);
            op.y[at] = op.residual ? op.residual[at] + value : value;
        }
}

constexpr long CHUNK_BYTES = 128 << 10;
// Weights that stay in the second-level cache from block to block of rows.

// y = f(x W^T + bias) + residual. With `op.swiglu` op.out must be a multiple of 16.
template <typename Format>
void run_tiles(const Linear& op, const Tiles<Format>& format, int threads) {
    static thread_local Scratch scratch;
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const long size = (Block::size(format.groups, MOST_ROWS) + 63) / 64 * 64;
    const long most = std::max(PANEL_BYTES / size, 1L) * MOST_ROWS;
    // Neighbouring tiles go to the same thread, which reads on where it was.
    const long fitting = std::max(1L, CHUNK_BYTES / (format.groups * Format::LINES * 64));
    const long share = std::clamp(tiles / (8L * threads), 1L, fitting);
    for (long first = 0; first < op.rows; first += most) {
        const long end = std::min(op.rows, first + most);
        const long blocks = (end - first + MOST_ROWS - 1) / MOST_ROWS;
        char* packed = scratch.bytes(static_cast<size_t>(blocks * size));
        const auto rows_of = [&](long block) {
            return static_cast<int>(std::min<long>(MOST_ROWS, end - first - block * MOST_ROWS));
        };
        const auto compute = [&](long begin, long stop, long block) {
            const int rows = rows_of(block);
            const Block x(packed + block * size, format.groups, rows);
            alignas(64) float result[MOST_ROWS][TILE_OUTPUTS], ups[MOST_ROWS][TILE_OUTPUTS];
            for (long tile = begin; tile < stop; tile++) {
                format.multiply(rows, x, tile, result);
                if (op.swiglu) format.multiply(rows, x, tile + tiles, ups);
                finish_tile(op, rows, first + block * MOST_ROWS, tile, result, ups);
            }
        };
        Phase packing(blocks);
        Tasks work((tiles + share - 1) / share);
        in_parallel(threads, [&] {
            packing.run([&](long block) {
                const int rows = rows_of(block);
                Block(packed + block * size, format.groups, rows)
                    .pack(format.x, first + block * MOST_ROWS, format.groups, rows);
            });
            long task;
            while (work.claim(task))
                for (long block = 0; block < blocks; block++)
                    compute(task * share, std::min(tiles, (task + 1) * share), block);
        });
    }
}
