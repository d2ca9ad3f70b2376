// y = x W^T with weights in a byte: groups of 32 inputs with a scale, value = q * scale, as GGUF's Q8_0 holds them.
#include "export.h"
#include "grouped.h"

namespace {

#if defined(HAS_VNNI)
constexpr int32_t SHIFT = 128;
#else
constexpr int32_t SHIFT = 0;
#endif
// What weights come plus, not signed.

struct SignedBytes {
    static constexpr bool MINIMUMS = false;
    static constexpr int LINES = 8;
    using Sum = int32_t;

    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs.
    static INLINE vi fours(const uint8_t* lines, int i) {
        const vi four = load_integers(lines + i * 64);
#if defined(HAS_VNNI)
        return four ^ splat(static_cast<int32_t>(0x80808080));
#else
        return four;
#endif
    }

    // What these weights have too much.
    static INLINE Sum sum(int32_t of_activations, float) { return -SHIFT * of_activations; }

    static INLINE vi start(Sum sum) { return splat(sum); }

    template <int R>
    static INLINE void add(const Weights& w, const Bytes* rows, vi (&total)[R]) {
        add_signed<R>(w, rows, total);
    }
};

}  // namespace

// As `eft_linear_int4`, with values [tiles, groups, 544], a group being 8 lines of bytes from -127 to 127, and 16 scales.
EXPORT void eft_linear_int8_groups(const float* x, long stride, long rows, long in, long out, const uint8_t* values,
                                   const float* bias, const float* norm, float eps, const float* residual, float* y,
                                   int swiglu, int threads) {
    run_groups(Linear{rows, in, out, bias, residual, y, swiglu != 0},
               Groups<SignedBytes>{{x, stride, in, norm, eps}, values, (in + GROUP - 1) / GROUP}, threads);
}
