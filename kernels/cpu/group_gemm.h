// Linears whose weights are in groups (`group_weights.h`). Every output adds up its groups in the same order, so a
// row's result is the same bit by bit in every batch.
//
// A few rows: weights go from memory straight into the products. More rows: each tile or two are unpacked once, and
// meet all rows while they lie in the cache.
#pragma once

#include "group_weights.h"

// Rows at most that are multiplied with weights straight from memory: as many as the registers have sums for.
#if defined(__AVX512F__)
constexpr int MAX_STREAMED_ROWS = 12;
#else
constexpr int MAX_STREAMED_ROWS = 7;
#endif
// Rows and vectors of outputs of unpacked weights that are multiplied at once.
#if defined(__AVX512VNNI__)
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = 2;
#else
constexpr int BLOCK_ROWS = MAX_STREAMED_ROWS, BLOCK_VECTORS = 1;
#endif

// Threads at most that pack all rows each, also where these are many: two do so sooner than one fetches what the other
// packed.
constexpr int MAX_THREADS_PACKING_APART = 2;

// Bytes from what few rows read to what they prefetch: further than the hardware's prefetcher, which stops at the end
// of a page.
constexpr long PREFETCH_BYTES = 4096;

// R rows times a tile in memory.
template <int R, typename Format>
__attribute__((noinline)) void multiply_stored(const Format& format, const typename Format::Block& block, long tile,
                                               TileOutputs* result) {
    using Stored = typename Format::Stored;
    constexpr int V = R * VECTORS_PER_TILE <= 6 ? VECTORS_PER_TILE : 1;
    const char* next = reinterpret_cast<const char*>(format.at(tile, 0)) + PREFETCH_BYTES;
#pragma GCC unroll 1
    for (int part = 0; part < VECTORS_PER_TILE; part += V) {
        const uint8_t* from[V];
        for (int v = 0; v < V; v++) from[v] = format.at(tile, part + v);
        const auto ahead = [&]() INLINE_LAMBDA {
            if (part > 0) return;
#pragma GCC unroll 16
            for (long line = 0; line < Stored::SIZE; line += 64) prefetch(next + line);
            next += Stored::SIZE;
        };
        vf acc[V][R];
        format.template multiply<Stored>(block, from, part, ahead, acc);
        for (int v = 0; v < V; v++)
            for (int r = 0; r < R; r++) store(result[r] + (part + v) * W, acc[v][r]);
    }
}

template <int R = MAX_STREAMED_ROWS, typename Format>
void multiply_stored(int rows, const Format& format, const typename Format::Block& block, long tile,
                     TileOutputs* result) {
    if (rows == R) return multiply_stored<R>(format, block, tile, result);
    if constexpr (R > 1) multiply_stored<R - 1>(rows, format, block, tile, result);
}

// A tile or two, unpacked.
template <typename Format>
class Panels {
   public:
    using Block = typename Format::Block;
    using Unpacked = typename Format::Unpacked;

    Panels(Scratch& scratch, const Format& format, bool both)
        : format_(format),
          size_(format.groups * Unpacked::SIZE),
          parts_(both ? 2 * VECTORS_PER_TILE : VECTORS_PER_TILE),
          memory_(reinterpret_cast<uint8_t*>(scratch.bytes(static_cast<size_t>(parts_ * size_)))) {}

    void unpack(long tile, long other) const {
        for (int part = 0; part < parts_; part++)
            format_.unpack(part < VECTORS_PER_TILE ? tile : other, part % VECTORS_PER_TILE, memory_ + part * size_);
    }

    // `results` = a block of rows times each of them.
    template <int R = BLOCK_ROWS>
    void multiply(int rows, const Block& block, TilePrefetcher& next, TileOutputs (&results)[2][BLOCK_ROWS]) const {
        if (rows == R)
            for (int part = 0; part < parts_; part += BLOCK_VECTORS) multiply_vectors<R>(block, part, next, results);
        else if constexpr (R > 1)
            multiply<R - 1>(rows, block, next, results);
    }

   private:
    template <int R>
    __attribute__((noinline)) void multiply_vectors(const Block& block, int first, TilePrefetcher& next,
                                                    TileOutputs (&results)[2][BLOCK_ROWS]) const {
        const uint8_t* from[BLOCK_VECTORS];
        for (int v = 0; v < BLOCK_VECTORS; v++) from[v] = memory_ + (first + v) * size_;
        vf acc[BLOCK_VECTORS][R];
        TilePrefetcher ahead = next;  // in registers
        format_.template multiply<Unpacked>(block, from, 0, [&]() INLINE_LAMBDA { ahead.step(); }, acc);
        next = ahead;
        for (int v = 0; v < BLOCK_VECTORS; v++)
            for (int r = 0; r < R; r++)
                store(results[(first + v) / VECTORS_PER_TILE][r] + (first + v) % VECTORS_PER_TILE * W, acc[v][r]);
    }

    const Format& format_;
    const long size_;
    const int parts_;
    uint8_t* const memory_;
};

template <typename Format>
void run_streamed(const GemmProblem& op, const Format& format, int threads) {
    using Block = typename Format::Block;
    const int rows = static_cast<int>(op.rows);
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    WorkStealingRanges ranges(tiles, threads);
    in_parallel(threads, [&] {
        const int own = ranges.own_range();
        const char* begin = reinterpret_cast<const char*>(format.at(std::min(ranges.next_task(own), tiles - 1), 0));
        for (long at = 0; at < PREFETCH_BYTES; at += 64) prefetch(begin + at);
        // Every thread packs all rows: that is quicker than to wait for one that did.
        static thread_local Scratch scratch;
        const Block block(scratch.bytes(static_cast<size_t>(Block::size(format.groups, rows))), format.groups, rows);
        op.begin_lora();
        format.pack(block, 0, rows);
        op.finish_lora();
        alignas(64) TileOutputs result[MAX_STREAMED_ROWS], ups[MAX_STREAMED_ROWS];
        ranges.run(own, [&](long tile, bool) {
            multiply_stored(rows, format, block, tile, result);
            if (op.swiglu) multiply_stored(rows, format, block, tiles + tile, ups);
            store_tile(op, rows, 0, tile, result, ups);
        });
    });
}

template <typename Format>
void run_unpacked(const GemmProblem& op, const Format& format, int threads) {
    using Block = typename Format::Block;
    static thread_local Scratch scratch;
    const long tiles = (op.out + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    // A task is a tile; or two, of gates and their ups, or neighbours where it takes two to fill a block's vectors, the
    // last one perhaps twice.
    const bool both = op.swiglu || BLOCK_VECTORS > VECTORS_PER_TILE;
    const bool neighbours = both && !op.swiglu;
    const long tasks = neighbours ? (tiles + 1) / 2 : tiles;
    const auto tile_of = [&](long task) { return neighbours ? 2 * task : task; };
    const auto other_of = [&](long task) { return neighbours ? std::min(2 * task + 1, tiles - 1) : task + tiles; };
    const auto weights = [&](long tile) { return reinterpret_cast<const char*>(format.at(tile, 0)); };
    const long size = (Block::size(format.groups, BLOCK_ROWS) + 63) / 64 * 64;
    const long most = std::max(MAX_PACKED_BYTES / size, 1L) * BLOCK_ROWS;
    for (long first = 0; first < op.rows; first += most) {
        const long count = std::min(op.rows - first, most);
        const long blocks = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
        const size_t bytes = static_cast<size_t>(blocks * size);
        const bool apart = threads <= MAX_THREADS_PACKING_APART;
        char* shared = apart ? nullptr : scratch.bytes(bytes);
        // Blocks of about the same size: a few rows of a last one would cost as much as many.
        const auto begin_of = [&](long block) { return count * block / blocks; };
        const auto rows_of = [&](long block) { return static_cast<int>(begin_of(block + 1) - begin_of(block)); };
        const auto packed_at = [&](char* packed, long block) {
            return Block(packed + block * size, format.groups, rows_of(block));
        };
        const auto pack = [&](char* packed, long block) {
            format.pack(packed_at(packed, block), first + begin_of(block), rows_of(block));
        };
        // The halves of a single tile are prefetched side by side.
        const long lines = (format.tile_bytes() / (both ? 1 : 2) + 63) / 64;
        const long steps = blocks * format.groups * ((both ? 2 : 1) * VECTORS_PER_TILE / BLOCK_VECTORS);
        Phase packing(blocks);
        WorkStealingRanges ranges(tasks, threads);
        in_parallel(threads, [&] {
            static thread_local Scratch own, unpacked;
            char* packed = apart ? own.bytes(bytes) : shared;
            op.begin_lora();
            if (apart)
                for (long block = 0; block < blocks; block++) pack(packed, block);
            else
                packing.run([&](long block) { pack(packed, block); });
            op.finish_lora();
            const Panels<Format> panels(unpacked, format, both);
            ranges.run([&](long task, bool more) {
                const long tile = tile_of(task), other = other_of(task);
                panels.unpack(tile, other);
                const char* ahead = weights(tile_of(task + 1));
                const char* end = ahead + lines * 64;
                TilePrefetcher next{ahead, both ? weights(other_of(task + 1)) : end, (lines + steps - 1) / steps};
                alignas(64) TileOutputs results[2][BLOCK_ROWS];
                for (long block = 0; block < blocks; block++) {
                    if (!more || next.tile >= end) next.lines = 0;
                    const int rows = rows_of(block);
                    const long row = first + begin_of(block);
                    panels.multiply(rows, packed_at(packed, block), next, results);
                    store_tile(op, rows, row, tile, results[0], results[1]);
                    if (neighbours && other != tile) store_tile(op, rows, row, other, results[1], nullptr);
                }
            });
        });
    }
}

template <typename Format>
void run_groups(const GemmProblem& op, const Format& format, int threads) {
    if (op.rows <= MAX_STREAMED_ROWS)
        run_streamed(op, format, threads);
    else
        run_unpacked(op, format, threads);
}
