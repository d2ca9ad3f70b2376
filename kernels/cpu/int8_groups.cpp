// y = x W^T with weights in a byte: groups of 32 inputs with a scale, value = q * scale, as GGUF's Q8_0 holds them.
#include "export.h"
#include "grouped.h"

namespace {

struct SignedBytes {
    static constexpr bool MINIMUMS = false;
    static constexpr int LINES = 8;
    using Sum = int32_t;
    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs.

    static INLINE void unpack(const uint8_t* lines, Weights& w) {
#pragma GCC unroll 8
        for (int i = 0; i < LINES; i++) {
            std::memcpy(&w.fours[i], lines + i * 64, sizeof w.fours[i]);
#if defined(__AVX512VNNI__)
            w.fours[i] ^= splat(static_cast<int32_t>(0x80808080));  // plus 128: not signed
#endif
        }
    }

    // What weights that come plus 128 have too much.
    static INLINE Sum sum(int32_t of_activations, float) { return -OFFSET * of_activations; }

    template <int R>
    static INLINE void dot(const Weights& w, const Bytes* rows, const Sum* sums, vi (&total)[R]) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) total[r] = splat(sums[r]);
        add_signed<R>(w, rows, total);
    }
};

}  // namespace

// As `eft_linear_int4`, with values [tiles, groups, 8, 64] from -127 to 127, and without minimums.
EXPORT void eft_linear_int8_groups(const float* x, long stride, long rows, long in, long out, const uint8_t* values,
                                   const uint16_t* scales, const float* bias, const float* norm, float eps,
                                   const float* residual, float* y, int swiglu, int threads) {
    run_tiles(Linear{rows, in, out, bias, residual, y, swiglu != 0},
              Grouped<SignedBytes>{{x, stride, in, norm, eps}, values, scales, nullptr, (in + GROUP - 1) / GROUP},
              threads);
}
