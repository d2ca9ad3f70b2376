// y = x W^T in float32, with what comes before and after it in a decoder layer: a norm of x, a bias, SwiGLU, a
// residual. The weight is read as it lies, [out][in], once for all rows.
#include "linear.h"

#include "export.h"

namespace {

struct Float32 {
    const float* x;
    long stride;  // floats from one row of x to the next
    long in;
    const float* weight;  // [out][in]
    const float* norm;    // or null
    float eps;

    long panel_bytes(long lanes) const { return lanes * in * static_cast<long>(sizeof(float)); }

    void pack(long row, int count, char* panel, int lane, int lanes) const {
        pack_rows(x + row * stride, stride, count, in, norm, eps, reinterpret_cast<float*>(panel) + lane, lanes);
    }

    template <int MV, int NR, int AHEAD>
    INLINE void multiply(const char* panel_bytes, long from, long then, vf (&acc)[NR][MV]) const {
        constexpr int HALF = NR / 2;
        const float* panel = reinterpret_cast<const float*>(panel_bytes);
        const float *first = weight + from * in, *second = weight + then * in;
#pragma GCC unroll 24
        for (int n = 0; n < NR; n++)
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) acc[n][m] = vf{};
        const auto step = [&](long k) INLINE_LAMBDA {
            vf x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) x[m] = load(panel + (k * MV + m) * W);
#pragma GCC unroll 24
            for (int n = 0; n < NR; n++) {
                const vf w = splat(n < HALF ? first[n * in + k] : second[(n - HALF) * in + k]);
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) acc[n][m] += w * x[m];
            }
        };
        long k = 0;
        for (; k + LINE <= in; k += LINE) {
            // The hardware does not follow so many rows at once: ask for the next tile's while this one is used.
#pragma GCC unroll 24
            for (int n = 0; n < NR; n++)
                prefetch((n < HALF ? first + (n + AHEAD) * in : second + (n - HALF + AHEAD) * in) + k);
            for (long i = k; i < k + LINE; i++) step(i);
        }
        for (; k < in; k++) step(k);
    }
};

}  // namespace

// y [rows, out] = f(norm(x) W^T + bias) + residual; see `Linear` and `Float32` for the arguments.
EXPORT void eft_linear(const float* x, long stride, long rows, long in, long out, const float* weight,
                       const float* bias, const float* norm, float eps, const float* residual, float* y, int swiglu,
                       int threads) {
    run_linear(Linear{rows, in, out, bias, residual, y, swiglu != 0}, Float32{x, stride, in, weight, norm, eps},
               threads);
}
