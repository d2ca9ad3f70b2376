// y = x W^T with weights in groups of 32 inputs: int4 with scale and minimum, value = q * scale + minimum; int8 with a
// scale, value = q * scale, as GGUF's Q8_0 has it.
#include "exports.h"
#include "group_gemm.h"

namespace {

struct Int4Groups {
    static constexpr bool MINIMUMS = true;
    static constexpr int LINES = 4;
    using Sum = float;

    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs in its low halves, and inputs 16 further in its high halves.
    static INLINE vi quads(const uint8_t* lines, int i) {
        const vi packed = load_integers(lines + i % LINES * 64);
        return (i < LINES ? packed : packed >> 4) & 0x0f0f0f0f;
    }

    static INLINE Sum sum(int32_t of_activations, float scale) { return static_cast<float>(of_activations) * scale; }

    static INLINE vi start(Sum) { return vi{}; }

    template <int R>
    static INLINE void add(const GroupQuads& w, const Int8Group* rows, vi (&total)[R]) {
        add_unsigned<R>(w, rows, total);
    }
};

// Added to the bytes of weights, because VNNI takes them without a sign.
#if defined(HAS_VNNI)
constexpr int32_t ZERO_POINT = 128;
#else
constexpr int32_t ZERO_POINT = 0;
#endif

struct Int8Groups {
    static constexpr bool MINIMUMS = false;
    static constexpr int LINES = 8;
    using Sum = int32_t;

    // Line i holds inputs 4 i to 4 i + 3 of 16 outputs.
    static INLINE vi quads(const uint8_t* lines, int i) {
        const vi quad = load_integers(lines + i * 64);
#if defined(HAS_VNNI)
        return quad ^ splat(static_cast<int32_t>(0x80808080));
#else
        return quad;
#endif
    }

    // The sum that the weights' zero point adds, to be subtracted.
    static INLINE Sum sum(int32_t of_activations, float) { return -ZERO_POINT * of_activations; }

    static INLINE vi start(Sum sum) { return splat(sum); }

    template <int R>
    static INLINE void add(const GroupQuads& w, const Int8Group* rows, vi (&total)[R]) {
        add_signed<R>(w, rows, total);
    }
};

}  // namespace

void eft_linear_int4(const float* x, long x_stride, long rows, long in, long out, const void* values,
                     const void*, const void*, const float* bias, const float* norm, float eps,
                     const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run_groups(GemmProblem{rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
               GroupedWeights<Int4Groups>{
                   {x, x_stride, in, norm, eps}, static_cast<const uint8_t*>(values), (in + GROUP - 1) / GROUP},
               threads);
}

void eft_linear_int8_groups(const float* x, long x_stride, long rows, long in, long out, const void* values,
                            const void*, const void*, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run_groups(GemmProblem{rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
               GroupedWeights<Int8Groups>{
                   {x, x_stride, in, norm, eps}, static_cast<const uint8_t*>(values), (in + GROUP - 1) / GROUP},
               threads);
}
