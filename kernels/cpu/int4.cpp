// y = x W^T with weights in four bits: groups of 32 inputs with scale and minimum, value = q * scale + minimum.
#include "export.h"
#include "grouped.h"

namespace {

struct Nibbles {
    static constexpr bool MINIMUMS = true;
    static constexpr int LINES = 4;
    using Sum = float;
    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs in its low halves, and inputs 16 further in its high halves.

    static INLINE void unpack(const uint8_t* lines, Weights& w) {
#pragma GCC unroll 4
        for (int i = 0; i < LINES; i++) {
            vi packed;
            std::memcpy(&packed, lines + i * 64, sizeof packed);
            w.fours[i] = packed & 0x0f0f0f0f;
            w.fours[i + LINES] = (packed >> 4) & 0x0f0f0f0f;
        }
    }

    static INLINE Sum sum(int32_t of_activations, float scale) { return static_cast<float>(of_activations) * scale; }

    template <int R>
    static INLINE void dot(const Weights& w, const Bytes* rows, const Sum*, vi (&total)[R]) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) total[r] = vi{};
        add_unsigned<R>(w, rows, total);
    }
};

}  // namespace

// y [rows, out] = f(norm(x) W^T + bias) + residual; values [tiles, groups, 4, 64], scales and minimums [tiles, groups, 16]
// float16, a tile being 16 outputs: the rest of the last one is zero. With `swiglu` out is a multiple of 16.
EXPORT void eft_linear_int4(const float* x, long stride, long rows, long in, long out, const uint8_t* values,
                            const uint16_t* scales, const uint16_t* minimums, const float* bias, const float* norm,
                            float eps, const float* residual, float* y, int swiglu, int threads) {
    run_tiles(Linear{rows, in, out, bias, residual, y, swiglu != 0},
              Grouped<Nibbles>{{x, stride, in, norm, eps}, values, scales, minimums, (in + GROUP - 1) / GROUP}, threads);
}
