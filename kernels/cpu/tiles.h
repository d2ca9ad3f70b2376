// Linears whose weights lie in tiles of 16 outputs, four bytes of inputs of each next to each other.
//
// A vector holds the same inputs of W outputs, and activations are broadcast: so one row reads the weights at the speed
// of memory, and many rows share what was loaded. Sums are of integers, exact, so a row's result is the same bit by
// bit in every batch.
//
// A `Format` says how a tile is multiplied:
//   struct Block                                        rows as bytes: size(groups, rows), Block(memory, groups, rows)
//   long groups                                         of 32 inputs, the last one filled with zeros
//   long tile_bytes() const
//   void pack(const Block&, long first, int rows) const                         makes a block of the rows from `first`
//   template <int R> void multiply(const Block&, long tile, long other, Outputs* result, Outputs* others) const
//                                                       R rows times two tiles, or one if both are the same
#pragma once

#include "linear.h"
#include "parallel.h"
#include "scratch.h"
#include "tile_dots.h"

constexpr int TILE_OUTPUTS = 16;

using Outputs = float[TILE_OUTPUTS];
// Of a row.

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12;
#else
constexpr int MOST_ROWS = 4;
#endif
// Rows that are computed at once: as many sums as the registers hold beside two tiles' weights.

// R rows of a block times two tiles, R being what `rows` says.
template <typename Format, int R = MOST_ROWS>
void multiply_tiles(const Format& format, int rows, const typename Format::Block& block, long tile, long other,
                    Outputs* result, Outputs* others) {
    if (rows == R) return format.template multiply<R>(block, tile, other, result, others);
    if constexpr (R > 1) multiply_tiles<Format, R - 1>(format, rows, block, tile, other, result, others);
}

// Writes the outputs of a tile: with `op.swiglu` of the tile of gates and the one of ups.
INLINE void finish_tile(const Linear& op, int rows, long row, long tile, const Outputs* result, const Outputs* ups) {
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
        for (int i = 0; i < TILE_OUTPUTS && n + i < op.out; i += W)
            finish_rest(op, row + r, n + i, static_cast<int>(std::min<long>(W, op.out - n - i)), load(result[r] + i),
                        vf{});
}

constexpr long CHUNK_BYTES = 128 << 10;
// Weights that stay in the second-level cache from block to block of rows.

// y = f(x W^T + bias) + residual. With `op.swiglu` op.out must be a multiple of 16.
template <typename Format>
void run_tiles(const Linear& op, const Format& format, int threads) {
    using Block = typename Format::Block;
    static thread_local Scratch scratch;
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    // Two tiles at once: of gates and their ups, or neighbours, the last one perhaps alone.
    const long twos = op.swiglu ? tiles : (tiles + 1) / 2;
    const long size = (Block::size(format.groups, MOST_ROWS) + 63) / 64 * 64;
    const long most = std::max(PANEL_BYTES / size, 1L) * MOST_ROWS;
    // Neighbouring tiles go to the same thread, which reads on where it was.
    const long fitting = std::max(1L, CHUNK_BYTES / (2 * format.tile_bytes()));
    const long share = std::clamp(twos / (8L * threads), 1L, fitting);
    for (long first = 0; first < op.rows; first += most) {
        const long count = std::min(op.rows - first, most);
        const long blocks = (count + MOST_ROWS - 1) / MOST_ROWS;
        char* packed = scratch.bytes(static_cast<size_t>(blocks * size));
        // Blocks of about the same size: a few rows of a last one would cost as much as many.
        const auto begin_of = [&](long block) { return count * block / blocks; };
        const auto rows_of = [&](long block) { return static_cast<int>(begin_of(block + 1) - begin_of(block)); };
        const auto compute = [&](long begin, long stop, long block) {
            const int rows = rows_of(block);
            const long row = first + begin_of(block);
            const Block x(packed + block * size, format.groups, rows);
            alignas(64) float result[MOST_ROWS][TILE_OUTPUTS], others[MOST_ROWS][TILE_OUTPUTS];
            for (long two = begin; two < stop; two++) {
                const long tile = op.swiglu ? two : 2 * two;
                const long other = op.swiglu ? two + tiles : std::min(tile + 1, tiles - 1);
                multiply_tiles(format, rows, x, tile, other, result, others);
                finish_tile(op, rows, row, tile, result, others);
                if (!op.swiglu && other != tile) finish_tile(op, rows, row, other, others, nullptr);
            }
        };
        Phase packing(blocks);
        Tasks work((twos + share - 1) / share);
        in_parallel(threads, [&] {
            packing.run([&](long block) {
                const int rows = rows_of(block);
                format.pack(Block(packed + block * size, format.groups, rows), first + begin_of(block), rows);
            });
            long task;
            while (work.claim(task))
                for (long block = 0; block < blocks; block++)
                    compute(task * share, std::min(twos, (task + 1) * share), block);
        });
    }
}
