// Weights in groups of 32 inputs, each with a scale, and activations with a scale a group too: a group's sum is exact
// in integers, and over the groups they are added in float, from the first to the last.
//
// In memory a tile's groups lie one after the other, each with all that belongs to it: GroupFormat::LINES lines
// of 64 bytes of 16 outputs, their 16 scales in float16, and their 16 minimums where there are any. So a few rows read
// one stream from beginning to end. Many rows share what is made of it in the cache: bytes and floats, of W outputs at
// a time.
//
// A `GroupFormat` describes a group:
//   static constexpr bool MINIMUMS         true if it has minimums beside its scales
//   static constexpr int LINES             lines of 64 bytes of 16 outputs
//   static vi quads(const uint8_t* lines, int i)                                 inputs 4 i to 4 i + 3 of W outputs
//   using Sum; static Sum sum(int32_t of_activations, float scale)               the part of a row that `start` and
//   minimums need static vi start(Sum)                                                         initial value of the sum
//   of its products template <int R> static void add(const GroupQuads&, const Int8Group*, vi (&total)[R]) without VNNI
#pragma once

#include "tile_gemm.h"

// Vectors of a tile's outputs.
constexpr int VECTORS_PER_TILE = TILE_OUTPUTS / W;

INLINE vi load_integers(const uint8_t* from) {
    vi v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// W float16 as float32. Source: multiplying by 2^112 moves the exponent, of subnormals too.
INLINE vf load_half(const uint8_t* from) {
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

template <typename GroupFormat>
struct GroupedWeights {
    using Sum = typename GroupFormat::Sum;

    // A group as it lies in memory: from its W outputs' first line on, and they are part `part` of a tile.
    struct Stored {
        static constexpr long SCALES = GroupFormat::LINES * 64, MINIMUMS = SCALES + TILE_OUTPUTS * 2;
        static constexpr long SIZE = GroupFormat::MINIMUMS ? MINIMUMS + TILE_OUTPUTS * 2 : MINIMUMS;

        static INLINE vi quads(const uint8_t* group, int i) { return GroupFormat::quads(group, i); }
        static INLINE vf scale(const uint8_t* group, int part) { return halves(group, SCALES, part); }
        static INLINE vf minimum(const uint8_t* group, int part) { return halves(group, MINIMUMS, part); }

        static INLINE vf halves(const uint8_t* group, long at, int part) {
            return load_half(group - part * W * 4 + at + part * W * 2);
        }
    };

    // A group of W outputs as it is multiplied.
    struct Unpacked {
        static constexpr long VECTOR = W * 4, SIZE = (QUADS_PER_GROUP + 1 + GroupFormat::MINIMUMS) * VECTOR;

        static INLINE vi quads(const uint8_t* group, int i) { return load_integers(group + i * VECTOR); }
        static INLINE vf scale(const uint8_t* group, int) { return bits(quads(group, QUADS_PER_GROUP)); }
        static INLINE vf minimum(const uint8_t* group, int) { return bits(quads(group, QUADS_PER_GROUP + 1)); }
    };

    // R rows: [groups][R] of all that a product reads.
    struct Block {
        Int8Group* bytes;
        float* scales;
        Sum* sums;

        static long size(long groups, int rows) {
            return rows * groups * static_cast<long>(sizeof(Int8Group) + sizeof(float) + sizeof(Sum));
        }

        Block(char* memory, long groups, int rows)
            : bytes(reinterpret_cast<Int8Group*>(memory)),
              scales(reinterpret_cast<float*>(bytes + groups * rows)),
              sums(reinterpret_cast<Sum*>(scales + groups * rows)) {}
    };

    ActivationQuantiser x;
    const uint8_t* values;  // [tiles][groups][Stored::SIZE]
    long groups;

    long tile_bytes() const { return groups * Stored::SIZE; }

    // Beginning of part `part` of a tile.
    const uint8_t* at(long tile, int part) const { return values + tile * tile_bytes() + part * W * 4; }

    // Makes a block of the rows from `first` on.
    void pack(const Block& block, long first, int rows) const {
        for (int row = 0; row < rows; row++)
            x.quantise_groups(
                first + row, [&](long group) INLINE_LAMBDA { return block.bytes[group * rows + row]; },
                [&](long group, float scale, int32_t sum) INLINE_LAMBDA {
                    block.scales[group * rows + row] = scale;
                    block.sums[group * rows + row] = GroupFormat::sum(sum, scale);
                });
    }

    // Part `part` of a tile to [groups][Unpacked::SIZE].
    void unpack(long tile, int part, uint8_t* to) const {
        const uint8_t* from = at(tile, part);
        for (long group = 0; group < groups; group++, from += Stored::SIZE, to += Unpacked::SIZE) {
#pragma GCC unroll 8
            for (int i = 0; i < QUADS_PER_GROUP; i++) put(to, i, Stored::quads(from, i));
            put(to, QUADS_PER_GROUP, bits(Stored::scale(from, part)));
            if constexpr (GroupFormat::MINIMUMS) put(to, QUADS_PER_GROUP + 1, bits(Stored::minimum(from, part)));
        }
    }

    // acc = R rows times V vectors of outputs, in the form in which they are, each from from[v] on; stored ones are the
    // parts of a tile from `part` on. Calls ahead() in each group.
    template <typename Form, int R, int V, typename Prefetch>
    INLINE void multiply(const Block& block, const uint8_t* (&from)[V], int part, Prefetch&& ahead,
                         vf (&acc)[V][R]) const {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[v][r] = vf{};
        const Int8Group* rows = block.bytes;
        const float* steps = block.scales;
        const Sum* sums = block.sums;
        for (long group = 0; group < groups; group++, rows += R, steps += R, sums += R) {
            ahead();
            vi total[V][R];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) total[v][r] = GroupFormat::start(sums[r]);
            add_products<Form>(from, rows, total);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const vf scale = Form::scale(from[v], part + v);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
                    acc[v][r] = fmadd(to_float(total[v][r]), scale * splat(steps[r]), acc[v][r]);
                if constexpr (GroupFormat::MINIMUMS) {
                    const vf minimum = Form::minimum(from[v], part + v);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) acc[v][r] = fmadd(minimum, splat(sums[r]), acc[v][r]);
                }
                from[v] += Form::SIZE;
            }
        }
    }

   private:
    static INLINE void put(uint8_t* group, int i, vi v) { std::memcpy(group + i * Unpacked::VECTOR, &v, sizeof v); }

    // total += a group's integers, all of them.
    template <typename Form, int R, int V>
    static INLINE void add_products(const uint8_t* const (&from)[V], const Int8Group* rows, vi (&total)[V][R]) {
#if defined(HAS_VNNI)
        // Each activation that is broadcast meets all vectors of weights, and these need few registers.
#pragma GCC unroll 8
        for (int i = 0; i < QUADS_PER_GROUP; i++) {
            vi w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) w[v] = Form::quads(from[v], i);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const vi x = broadcast_quad(rows[r] + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) total[v][r] = dot_unsigned_quad(total[v][r], w[v], x);
            }
        }
#else
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            GroupQuads w;
#pragma GCC unroll 8
            for (int i = 0; i < QUADS_PER_GROUP; i++) w.quads[i] = Form::quads(from[v], i);
            GroupFormat::template add<R>(w, rows, total[v]);
        }
#endif
    }
};
