// y = x W^T in float32, with what comes before and after it in a decoder layer: a norm of x, a bias, SwiGLU, a
// residual. The weight is read as it lies, [out][in], once for all rows.
#include <algorithm>

#include "export.h"
#include "panel.h"
#include "parallel.h"
#include "scratch.h"

namespace {

// Outputs of one task, a multiple of every tile's height.
constexpr int TASK = 24;
// Panels of so many bytes at most are computed with at a time, to stay in the second-level cache.
#ifndef DIST
#define DIST 0
#endif
constexpr long PANEL_BYTES = 1 << 20;

struct Linear {
    const float* x;
    long stride;  // floats from one row of x to the next
    long rows, in, out;
    const float* weight;
    const float* bias;      // or null
    const float* norm;      // or null
    float eps;
    const float* residual;  // [rows][out], or null
    float* y;               // [rows][out]
    bool swiglu;            // weight is [2 * out][in]: gates, then ups
};

// NR weights rows times a panel of MV vectors. The first half of the rows begins at `first`, the others at `second`.
template <int MV, int NR, int AHEAD>
INLINE void multiply(const float* panel, const float* first, const float* second, long in, vf (&acc)[NR][MV]) {
    constexpr int HALF = NR / 2;
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
        for (int n = 0; n < NR; n++) prefetch((n < HALF ? first + (n + AHEAD) * in : second + (n - HALF + AHEAD) * in) + k + DIST);
        for (long i = k; i < k + LINE; i++) step(i);
    }
    for (; k < in; k++) step(k);
}

// Writes R outputs of up to MV * W rows, with bias and residual.
template <int MV, int R>
INLINE void finish(const Linear& op, const vf (&acc)[R][MV], long n, long row, long valid) {
    alignas(64) float turned[W][W];
#pragma GCC unroll 4
    for (int m = 0; m < MV; m++)
        for (int j = 0; j < R; j += W) {
            vf block[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
                block[i] = j + i < R ? acc[j + i < R ? j + i : 0][m] : vf{};
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(turned[i], block[i]);
            const int width = std::min(W, R - j);
            const long lanes = std::min<long>(W, valid - m * W);
            for (long lane = 0; lane < lanes; lane++) {
                const long at = (row + m * W + lane) * op.out + n + j;
                for (int i = 0; i < width; i++) {
                    float value = turned[lane][i];
                    if (op.bias && !op.swiglu) value += op.bias[n + j + i];
                    op.y[at + i] = op.residual ? op.residual[at + i] + value : value;
                }
            }
        }
}

template <int MV, int NR>
void tile(const Linear& op, const float* panel, long n, long row, long valid) {
    vf acc[NR][MV];
    if constexpr (NR >= 2) {
        if (op.swiglu) {
            constexpr int R = NR / 2;
            multiply<MV, NR, R>(panel, op.weight + n * op.in, op.weight + (n + op.out) * op.in, op.in, acc);
            vf mixed[R][MV];
#pragma GCC unroll 12
            for (int j = 0; j < R; j++)
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) {
                    const vf gate = acc[j][m] + splat(op.bias ? op.bias[n + j] : 0.0f);
                    const vf up = acc[j + R][m] + splat(op.bias ? op.bias[op.out + n + j] : 0.0f);
                    mixed[j][m] = silu(gate) * up;
                }
            finish<MV, R>(op, mixed, n, row, valid);
            return;
        }
    }
    multiply<MV, NR, NR>(panel, op.weight + n * op.in, op.weight + (n + NR / 2) * op.in, op.in, acc);
    finish<MV, NR>(op, acc, n, row, valid);
}

// Outputs n to `end` for one panel.
template <int MV>
void panel_outputs(const Linear& op, const float* panel, long n, long end, long row, long valid) {
#if defined(__AVX512F__)
    constexpr int NR = MV == 1 ? 24 : 12;
#else
    constexpr int NR = MV == 1 ? 12 : MV == 2 ? 6 : 3;
#endif
    constexpr int EVEN = NR == 3 ? 2 : NR;  // gates and ups come in pairs
    if (op.swiglu) {
        for (; n + EVEN / 2 <= end; n += EVEN / 2) tile<MV, EVEN>(op, panel, n, row, valid);
        for (; n < end; n++) tile<MV, 2>(op, panel, n, row, valid);
        return;
    }
    for (; n + NR <= end; n += NR) tile<MV, NR>(op, panel, n, row, valid);
    for (; n < end; n++) tile<MV, 1>(op, panel, n, row, valid);
}

// Outputs n to `end` for all panels, a task at a time: its weights stay in the cache from panel to panel.
void outputs(const Linear& op, const float* panels, long n, long end, long first_row, long end_row) {
    for (long row = first_row; row < end_row; row += LANES) {
        const float* panel = panels + (row - first_row) * op.in;
        const long valid = std::min<long>(LANES, end_row - row);
        switch (panel_vectors(row, end_row)) {
            case 1: panel_outputs<1>(op, panel, n, end, row, valid); break;
            case 2: panel_outputs<2>(op, panel, n, end, row, valid); break;
#if !defined(__AVX512F__)
            case 4: panel_outputs<4>(op, panel, n, end, row, valid); break;
#endif
        }
    }
}

void pack(const Linear& op, float* panels, long group, long first_row, long end_row) {
    const long row = first_row + group * W;
    const long panel = group * W / LANES * LANES;
    const int lanes = panel_vectors(first_row + panel, end_row) * W;
    float* out = panels + panel * op.in + group * W % LANES;
    const int count = static_cast<int>(std::min<long>(W, end_row - row));
    pack_rows(op.x + row * op.stride, op.stride, std::max(count, 0), op.in, op.norm, op.eps, out, lanes);
}

}  // namespace

// y [rows, out] = f(norm(x) W^T + bias) + residual; see `Linear` for the arguments.
EXPORT void eft_linear(const float* x, long stride, long rows, long in, long out, const float* weight,
                       const float* bias, const float* norm, float eps, const float* residual, float* y, int swiglu,
                       int threads) {
    static thread_local Scratch scratch;
    const Linear op{x, stride, rows, in, out, weight, bias, norm, eps, residual, y, swiglu != 0};
    const long fit = PANEL_BYTES / 4 / std::max(in, 1L) / LANES * LANES;
    const long most = std::max<long>(fit, 4 * LANES);
    // Neighbouring outputs go to the same thread: what it asked for early lies in its own cache.
    const long share = std::max(1L, out / (TASK * 4L * threads)) * TASK;
    const long tasks = (out + share - 1) / share;
    for (long first = 0; first < rows; first += most) {
        const long end = std::min(rows, first + most);
        const long panels = (end - first + LANES - 1) / LANES;
        float* packed = scratch.floats(static_cast<size_t>(panels * LANES * in));
        const long last = first + (panels - 1) * LANES;
        Phase packing((panels - 1) * MOST_VECTORS + panel_vectors(last, end));
        Tasks work(tasks);
        in_parallel(threads, [&] {
            packing.run([&](long group) { pack(op, packed, group, first, end); });
            long task;
            while (work.claim(task))
                outputs(op, packed, task * share, std::min(out, (task + 1) * share), first, end);
        });
    }
}
