// y = x W^T with weights in int8, one scale an output, and activations in two bytes.
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "activations.h"
#include "export.h"
#include "linear.h"

namespace {

// A panel begins with the rows' scales [lanes], then holds groups of four bytes, [2][in / 4][lanes]: of each activation
// first the higher byte, from -127 to 127, then the lower one, from -128 to 127.

struct Int8 {
    Activations x;
    long in;
    const int8_t* weight;  // [out][in]
    const float* scales;   // [out]
    const int32_t* sums;   // [out]: of each output's weights

    long groups() const { return (in + 3) / 4; }

    long panel_bytes(long lanes) const { return lanes * 4 * (2 * groups() + 1); }

    void pack(long row, int count, char* panel, int lane, int lanes) const {
        float* row_scales = reinterpret_cast<float*>(panel);
        int32_t* out = reinterpret_cast<int32_t*>(panel) + lanes;
        for (int i = 0; i < W; i++) {
            if (i >= count) {
                row_scales[lane + i] = 0.0f;
                for (long group = 0; group < 2 * groups(); group++) out[group * lanes + lane + i] = 0;
                continue;
            }
            row_scales[lane + i] = x.quantise(row + i, [&](vi q, long k) INLINE_LAMBDA {
                const vi high = (q + 128) >> 8;
                store_bytes(high, k, out + lane + i, lanes);
                store_bytes(q - (high << 8), k, out + groups() * lanes + lane + i, lanes);
            });
        }
    }

    // The low bytes of q, features k to k + W, as groups `lanes` apart.
    INLINE void store_bytes(vi q, long k, int32_t* out, int lanes) const {
        const vb bytes = __builtin_convertvector(q + OFFSET, vb);
        int32_t fours[W / 4];
        std::memcpy(fours, &bytes, sizeof fours);
        for (long group = k / 4; group < std::min(k / 4 + W / 4, groups()); group++)
            out[group * lanes] = fours[group - k / 4];
    }

    template <int MV, int NR, int AHEAD>
    INLINE void multiply(const char* panel, long from, long then, vf (&result)[NR][MV]) const {
        constexpr int HALF = NR / 2;
        vi high[NR][MV], low[NR][MV];
        add_up<MV, NR, AHEAD>(panel, 0, from, then, high);
        add_up<MV, NR, AHEAD>(panel, 1, from, then, low);
#pragma GCC unroll 24
        for (int n = 0; n < NR; n++) {
            const long output = n < HALF ? from + n : then + n - HALF;
            const vi correction = splat(OFFSET * sums[output]);
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) {
                const vf total = to_float(high[n][m] - correction) * splat(256.0f) + to_float(low[n][m] - correction);
                const vf row_scale = load(reinterpret_cast<const float*>(panel) + m * W);
                result[n][m] = total * (row_scale * splat(scales[output]));
            }
        }
    }

    // Sums of the weights with one byte of the activations: the higher (0) or the lower (1).
    template <int MV, int NR, int AHEAD>
    INLINE void add_up(const char* panel, long byte, long from, long then, vi (&acc)[NR][MV]) const {
        constexpr int HALF = NR / 2;
        const int32_t* rows = reinterpret_cast<const int32_t*>(panel) + (1 + byte * groups()) * MV * W;
        const int8_t *first = weight + from * in, *second = weight + then * in;
        for (auto& line : acc)
            for (vi& sum : line) sum = vi{};
        const auto step = [&](long group, long bytes) INLINE_LAMBDA {
            vi x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) std::memcpy(&x[m], rows + (group * MV + m) * W, sizeof(vi));
#pragma GCC unroll 24
            for (int n = 0; n < NR; n++) {
                const int8_t* at = (n < HALF ? first + n * in : second + (n - HALF) * in) + group * 4;
                int32_t four = 0;
                std::memcpy(&four, at, bytes);
                const vi w = splat(four);
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) acc[n][m] = dot4(acc[n][m], x[m], w);
            }
        };
        constexpr long GROUPS_IN_LINE = 16;
        const long whole = in / 4;
        long group = 0;
        for (; group + GROUPS_IN_LINE <= whole; group += GROUPS_IN_LINE) {
            if (byte == 0)
#pragma GCC unroll 24
                for (int n = 0; n < NR; n++)
                    prefetch((n < HALF ? first + (n + AHEAD) * in : second + (n - HALF + AHEAD) * in) + group * 4);
            for (long i = group; i < group + GROUPS_IN_LINE; i++) step(i, 4);
        }
        for (; group < whole; group++) step(group, 4);
        if (in % 4) step(group, in % 4);
    }
};

}  // namespace

// As `eft_linear`, with weight [out, in] int8, scales [out] and the sums of the weight's rows [out].
EXPORT void eft_linear_int8(const float* x, long stride, long rows, long in, long out, const int8_t* weight,
                            const float* scales, const int32_t* sums, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, int threads) {
    run_linear(Linear{rows, in, out, bias, residual, y, swiglu != 0},
               Int8{{x, stride, in, norm, eps}, in, weight, scales, sums}, threads);
}
