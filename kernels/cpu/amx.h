// Intel's AMX: registers of 16 rows of 64 bytes, here squares, since tiles are of weights.
//
// A square of weights is 16 lines as they lie in memory, 64 inputs of 16 outputs; one of activations 64 inputs of 16 rows.
// Their product, 16 rows of 16 outputs in int32, takes the time of 16 instructions of VNNI, which are 16 times as many.
#pragma once

#if defined(__AMX_INT8__)
#define HAS_AMX

#include <immintrin.h>

#include <cstdint>

constexpr int SQUARE = 1024;
// Bytes.
constexpr int SQUARE_ROWS = 16;

// While a thread has this, it has eight squares. Others cost the system less when it changes threads.
class Squares {
   public:
    Squares() {
        alignas(64) Shapes shapes = {};
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = SQUARE_ROWS;
        }
        _tile_loadconfig(&shapes);
    }
    ~Squares() { _tile_release(); }
    Squares(const Squares&) = delete;
    Squares& operator=(const Squares&) = delete;

   private:
    // As the processor reads it.
    struct Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};
#endif
