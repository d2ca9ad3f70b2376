// y = x W^T with weights in int8, one scale an output, and activations quantised row by row to two bytes each: in one
// byte the outliers of a row leave too little for the rest (SmolLM2's perplexity rises by 4%).
//
// Sums are of integers and exact, so a row's result is the same bit by bit in every batch, on every instruction set
// whose rounding of the activations is the same.
#include "int8.h"

#include <cmath>

#include "export.h"
#include "linear.h"

namespace {

// A panel begins with the rows' scales [lanes], then holds groups of four bytes, [2][in / 4][lanes]: of each activation
// first the higher byte, from -127 to 127, then the lower one, from -128 to 127.
constexpr float MOST = 127.0f * 256.0f;
// What a row's largest activation becomes.

struct Int8 {
    const float* x;
    long stride;
    long in;
    const int8_t* weight;  // [out][in]
    const float* scales;   // [out]
    const int32_t* sums;   // [out]: of each output's weights
    const float* norm;
    float eps;

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
            const float* from = x + (row + i) * stride;
            const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
            const float most = largest(from, inverse);
            row_scales[lane + i] = most / MOST;
            // A row that is not finite has such a scale, and so have its outputs, whatever the integers are.
            const float factor = most > 0.0f && most < INFINITY ? MOST / most : 0.0f;
            for (long k = 0; k < in; k += W) {
                const vi q = factor > 0.0f ? rounded(values(from, k, inverse) * splat(factor)) : vi{};
                const vi high = (q + 128) >> 8;
                store_bytes(high, k, out + lane + i, lanes);
                store_bytes(q - (high << 8), k, out + groups() * lanes + lane + i, lanes);
            }
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

    // W of a row's values from feature k on, normalised; zero beyond its end.
    INLINE vf values(const float* from, long k, float inverse) const {
        if (k + W <= in) return norm ? load(from + k) * splat(inverse) * load(norm + k) : load(from + k);
        float rest[W] = {};
        for (long i = k; i < in; i++) rest[i - k] = norm ? from[i] * inverse * norm[i] : from[i];
        return load(rest);
    }

    // The largest size of a row's values; not finite if one of them is not.
    INLINE float largest(const float* from, float inverse) const {
        vf most = {}, broken = {};
        for (long k = 0; k < in; k += W) {
            const vf v = values(from, k, inverse);
            most = max(most, max(v, -v));
            broken += v - v;
        }
        float size = 0.0f;
        for (int i = 0; i < W; i++) size = std::max(size, most[i]);
        return size + sum(broken);
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
               Int8{x, stride, in, weight, scales, sums, norm, eps}, threads);
}
