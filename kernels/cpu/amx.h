// Intel's AMX: tile registers of 16 rows of 64 bytes. Where "tile" alone would be a tile of weights (`tile_gemm.h`),
// they are called AMX tiles.
//
// An AMX tile of weights is 16 lines as they lie in memory, 64 inputs of 16 outputs; one of activations 64 inputs of 16
// rows. Their product, 16 rows of 16 outputs in int32, takes 16 cycles, in which 32 instructions of VNNI do an eighth
// of it.
//
// Tiles of bfloat16 are 16 rows of 32, and their products go to float32.
//
// Groups of 32 inputs with scales of their own (`group_weights.h`) gain nothing: the sums of every group leave their
// AMX tile.
#pragma once

#if defined(__AMX_INT8__)
#define HAS_AMX

#include <cstdint>

#include "simd.h"

// Size of an AMX tile: bytes, and rows of 64 bytes.
constexpr int AMX_TILE_BYTES = 1024;
constexpr int AMX_TILE_ROWS = 16;

// While a thread has this object, it can use eight AMX tiles. Threads without them cost the system less.
class AmxTiles {
   public:
    AmxTiles() {
        alignas(64) Shapes shapes = {};
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = AMX_TILE_ROWS;
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~AmxTiles() { asm volatile("tilerelease"); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    // GCC's intrinsics do not say that they read memory, and want numbers that are written out.
    template <int I>
    static INLINE void clear() {
        asm volatile("tilezero %%tmm%c0" : : "i"(I));
    }

    // `stride` bytes from one row to the next.
    template <int I>
    static INLINE void load(const void* from, long stride = 64) {
        asm volatile("tileloadd (%1,%2), %%tmm%c0" : : "i"(I), "r"(from), "r"(stride) : "memory");
    }

    template <int I>
    static INLINE void store(void* to, long stride = 64) {
        asm volatile("tilestored %%tmm%c0, (%1,%2)" : : "i"(I), "r"(to), "r"(stride) : "memory");
    }

    // SUMS += activations, without sign, times weights, with one.
    template <int SUMS, int ACTIVATIONS, int WEIGHTS>
    static INLINE void multiply() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ACTIVATIONS), "i"(WEIGHTS));
    }

    // SUMS [16][16] += a [16][32] times b [16 pairs of rows][16][2], bfloat16. What is added to a sum is the sum of
    // products at even places plus that of those at odd ones, each one fused multiply-add after the other.
    template <int SUMS, int A, int B>
    static INLINE void multiply_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
    }

   private:
    // As the processor reads it.
    struct Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};
#endif
