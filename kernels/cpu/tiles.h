// Linears whose weights lie in tiles of 16 outputs, four bytes of inputs of each next to each other.
//
// A vector holds the same inputs of W outputs, and activations are broadcast: so one row reads the weights at the speed
// of memory, and many rows share what was loaded. Sums are of integers, exact, so a row's result is the same bit by
// bit in every batch.
//
// A `Format` says how a tile is multiplied:
//   Activations x; long groups                          the rows; groups of 32 inputs, the last one filled with zeros
//   static constexpr int OFFSET                         what is added to the bytes of activations
//   long tile_bytes() const
//   template <int R> void multiply(const Block&, long tile, float (*result)[16]) const
#pragma once

#include "activations.h"
#include "linear.h"
#include "parallel.h"
#include "scratch.h"
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
    float* sums;    // of a group's activations
    float* scales;  // [R]

    static long size(long groups, int rows) {
        return rows * (groups * static_cast<long>(sizeof(Bytes) + sizeof(float)) + static_cast<long>(sizeof(float)));
    }

    Block(char* memory, long groups, int rows)
        : bytes(reinterpret_cast<Bytes*>(memory)),
          sums(reinterpret_cast<float*>(memory + rows * groups * static_cast<long>(sizeof(Bytes)))),
          scales(sums + rows * groups) {}

    template <int OFFSET>
    void pack(const Activations& x, long first, long groups, int rows) {
        for (int row = 0; row < rows; row++) {
            std::memset(&bytes[(groups - 1) * rows + row], 0, sizeof(Bytes));
            scales[row] = x.quantise(first + row, [&](vi q, long k) INLINE_LAMBDA {
                const vi high = (q + 128) >> 8;
                const long at = k / GROUP * rows + row;
                store_bytes(high + OFFSET, bytes[at].high + k % GROUP);
                store_bytes(q - (high << 8) + OFFSET, bytes[at].low + k % GROUP);
            });
            for (long group = 0; group < groups; group++) {
                const Bytes& from = bytes[group * rows + row];
                int32_t high = 0, low = 0;
                for (int i = 0; i < GROUP; i++) high += from.high[i];
                for (int i = 0; i < GROUP; i++) low += from.low[i];
                sums[group * rows + row] = static_cast<float>(high * 256 + low);
            }
        }
    }

    static INLINE void store_bytes(vi q, int8_t* to) {
        const vb narrow = __builtin_convertvector(q, vb);
        std::memcpy(to, &narrow, sizeof narrow);
    }
};

// R rows of a block times the 16 outputs of a tile, R being what `rows` says.
template <typename Format, int R = MOST_ROWS>
void multiply_tile(const Format& format, int rows, const Block& block, long tile, float (*result)[TILE_OUTPUTS]) {
    if (rows == R) return format.template multiply<R>(block, tile, result);
    if constexpr (R > 1) multiply_tile<Format, R - 1>(format, rows, block, tile, result);
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
        for (int i = 0; i < TILE_OUTPUTS && n + i < op.out; i += W)
            finish_rest(op, row + r, n + i, static_cast<int>(std::min<long>(W, op.out - n - i)), load(result[r] + i),
                        vf{});
}

constexpr long CHUNK_BYTES = 128 << 10;
// Weights that stay in the second-level cache from block to block of rows.

// y = f(x W^T + bias) + residual. With `op.swiglu` op.out must be a multiple of 16.
template <typename Format>
void run_tiles(const Linear& op, const Format& format, int threads) {
    static thread_local Scratch scratch;
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const long size = (Block::size(format.groups, MOST_ROWS) + 63) / 64 * 64;
    const long most = std::max(PANEL_BYTES / size, 1L) * MOST_ROWS;
    // Neighbouring tiles go to the same thread, which reads on where it was.
    const long fitting = std::max(1L, CHUNK_BYTES / format.tile_bytes());
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
                multiply_tile(format, rows, x, tile, result);
                if (op.swiglu) multiply_tile(format, rows, x, tile + tiles, ups);
                finish_tile(op, rows, first + block * MOST_ROWS, tile, result, ups);
            }
        };
        Phase packing(blocks);
        Tasks work((tiles + share - 1) / share);
        in_parallel(threads, [&] {
            packing.run([&](long block) {
                const int rows = rows_of(block);
                Block(packed + block * size, format.groups, rows)
                    .template pack<Format::OFFSET>(format.x, first + block * MOST_ROWS, format.groups, rows);
            });
            long task;
            while (work.claim(task))
                for (long block = 0; block < blocks; block++)
                    compute(task * share, std::min(tiles, (task + 1) * share), block);
        });
    }
}
