// y = x W^T with weights in four bits: groups of 32 inputs with scale and minimum, value = q * scale + minimum.
#include "export.h"
#include "grouped.h"

namespace {

struct Nibbles {
    static constexpr bool MINIMUMS = true;
    static constexpr int LINES = 4;
    using Sum = float;

    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs in its low halves, and inputs 16 further in its high halves.
    static INLINE vi fours(const uint8_t* lines, int i) {
        const vi packed = load_integers(lines + i % LINES * 64);
        return (i < LINES ? packed : packed >> 4) & 0x0f0f0f0f;
    }

    static INLINE Sum sum(int32_t of_activations, float scale) { return static_cast<float>(of_activations) * scale; }

    static INLINE vi start(Sum) { return vi{}; }

    template <int R>
    static INLINE void add(const Weights& w, const Bytes* rows, vi (&total)[R]) {
        add_unsigned<R>(w, rows, total);
    }
};

}  // namespace

// y [rows, out] = f(norm(x) W^T + bias) + residual; values [tiles, groups, 320], a group being 4 lines of 64 bytes, 16
// scales and 16 minimums in float16, and a tile 16 outputs: the rest of the last one is zero. With `swiglu` out is a
// multiple of 16.
EXPORT void eft_linear_int4(const float* x, long stride, long rows, long in, long out, const uint8_t* values,
                            const float* bias, const float* norm, float eps, const float* residual, float* y, int swiglu,
                            int threads) {
    run_groups(Linear{rows, in, out, bias, residual, y, swiglu != 0},
               Groups<Nibbles>{{x, stride, in, norm, eps}, values, (in + GROUP - 1) / GROUP}, threads);
}
