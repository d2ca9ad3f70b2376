// Linears whose weights lie in tiles of 16 outputs, four bytes of inputs of each next to each other.
//
// A vector holds the same inputs of W outputs, and activations are broadcast: so one row reads the weights at the speed
// of memory, and many rows share what was loaded. Sums are of integers, exact, so a row's result is the same bit by
// bit in every batch.
//
// A `Format` defines how a tile is multiplied:
//   static constexpr int ROWS                           computed at once, at most
//   static constexpr int LINES                          of 64 bytes of a group of 32 inputs
//   static constexpr int STEPS                          ahead that a group of two tiles takes
//   struct Block                                        rows as bytes: size(groups, rows), Block(memory, groups, rows)
//   long groups                                         of 32 inputs, the last one filled with zeros
//   const ... * values                                  [tiles][groups][LINES][64]
//   void pack(const Block&, long first, int rows) const                         makes a block of the rows from `first`
//   void multiply(int rows, const Block&, long tile, long other, TilePrefetcher&, TileOutputs* result, TileOutputs*
//   others) const
//                                                       a block times two tiles, or one if both are the same
//   struct Session                                      that a thread has while it multiplies
#pragma once

#include "epilogue.h"
#include "int8_dot.h"
#include "quantise_activations.h"
#include "scratch.h"
#include "threading.h"

// Outputs of a tile of weights: floats in the widest vector.
constexpr int TILE_OUTPUTS = 16;

// The outputs of one row.
using TileOutputs = float[TILE_OUTPUTS];

// Prefetches the next two tiles as evenly as those before them are multiplied: then memory is busy all the time, and
// does not wait at the end of a page as the hardware's own prefetching does.
struct TilePrefetcher {
    const char *tile, *other;
    long lines;  // of each that are asked for in a step

    INLINE void step() {
        for (long i = 0; i < lines; i++) {
            prefetch(tile + i * 64);
            prefetch(other + i * 64);
        }
        tile += lines * 64;
        other += lines * 64;
    }
};

// Writes a whole tile's outputs from n on.
template <bool SWIGLU>
__attribute__((noinline)) void store_full_tile(const GemmProblem& from, int rows, long row, long n,
                                               const TileOutputs* result, const TileOutputs* ups) {
    GemmProblem op = from;
    op.swiglu = SWIGLU;
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < TILE_OUTPUTS; i += W)
            store(op.y + (row + r) * op.out + n + i,
                  apply_epilogue(op, row + r, n + i, load(result[r] + i), SWIGLU ? load(ups[r] + i) : vf{}));
}

// Writes the outputs of a tile: with `op.swiglu` of the tile of gates and the one of ups.
INLINE void store_tile(const GemmProblem& op, int rows, long row, long tile, const TileOutputs* result,
                       const TileOutputs* ups) {
    const long n = tile * TILE_OUTPUTS;
    if (op.swiglu) return store_full_tile<true>(op, rows, row, n, result, ups);
    if (n + TILE_OUTPUTS <= op.out) return store_full_tile<false>(op, rows, row, n, result, ups);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < TILE_OUTPUTS && n + i < op.out; i += W)
            store_tail(op, row + r, n + i, static_cast<int>(std::min<long>(W, op.out - n - i)), load(result[r] + i),
                       vf{});
}

// Rows at least of blocks that are made smaller so that each thread packs as many of them as the others: the weights
// are loaded once more for each block.
constexpr long MIN_BLOCK_ROWS = 8;

// y = f(x W^T + bias) + residual. With `op.swiglu` op.out must be a multiple of 16.
template <typename Format>
void run_tiles(const GemmProblem& op, const Format& format, int threads) {
    using Block = typename Format::Block;
    constexpr int ROWS = Format::ROWS;
    static thread_local Scratch scratch;
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    // Two tiles at once: of gates and their ups, or neighbours, the last one perhaps alone.
    const long twos = op.swiglu ? tiles : (tiles + 1) / 2;
    const auto tile_of = [&](long two) { return op.swiglu ? two : 2 * two; };
    const auto other_of = [&](long two) { return op.swiglu ? two + tiles : std::min(2 * two + 1, tiles - 1); };
    const long tile_bytes = format.groups * Format::LINES * 64;
    const auto weights = [&](long tile) { return reinterpret_cast<const char*>(format.values) + tile * tile_bytes; };
    const long size = (Block::size(format.groups, ROWS) + 63) / 64 * 64;
    const long most = std::max(MAX_PACKED_BYTES / size, 1L) * ROWS;
    for (long first = 0; first < op.rows; first += most) {
        const long count = std::min(op.rows - first, most);
        long blocks = (count + ROWS - 1) / ROWS;
        const long fair = (blocks + threads - 1) / threads * threads;
        if (count >= fair * MIN_BLOCK_ROWS) blocks = fair;
        char* packed = scratch.bytes(static_cast<size_t>(blocks * size));
        // Blocks of about the same size: a few rows of a last one would cost as much as many.
        const auto begin_of = [&](long block) { return count * block / blocks; };
        const auto rows_of = [&](long block) { return static_cast<int>(begin_of(block + 1) - begin_of(block)); };
        const long steps = blocks * Format::STEPS;
        const auto compute = [&](long two, bool more) {
            const long tile = tile_of(two), other = other_of(two);
            TilePrefetcher next{weights(tile_of(two + 1)), weights(other_of(two + 1)),
                                (Format::LINES + steps - 1) / steps};
            const char* end = next.tile + tile_bytes;
            alignas(64) float result[ROWS][TILE_OUTPUTS], others[ROWS][TILE_OUTPUTS];
            for (long block = 0; block < blocks; block++) {
                if (!more || next.tile >= end) next.lines = 0;
                const int rows = rows_of(block);
                const long row = first + begin_of(block);
                const Block x(packed + block * size, format.groups, rows);
                format.multiply(rows, x, tile, other, next, result, others);
                store_tile(op, rows, row, tile, result, others);
                if (!op.swiglu && other != tile) store_tile(op, rows, row, other, others, nullptr);
            }
        };
        Phase packing(blocks);
        WorkStealingRanges ranges(twos, threads);
        in_parallel(threads, [&] {
            op.begin_lora();
            packing.run([&](long block) {
                const int rows = rows_of(block);
                format.pack(Block(packed + block * size, format.groups, rows), first + begin_of(block), rows);
            });
            op.finish_lora();
            [[maybe_unused]] const typename Format::Session session;
            ranges.run(compute);
        });
    }
}
