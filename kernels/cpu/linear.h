// What the linears of all weight formats share: the walk over outputs and panels, and what follows a product.
//
// A `Format` says how rows are packed into a panel and how weights are multiplied with one:
//   long panel_bytes(long lanes) const
//   void pack(long row, int count, char* panel, int lane, int lanes) const    W rows from `row`, `count` of them real
//   template <int MV, int NR, int AHEAD> void multiply(const char* panel, long first, long second, vf (&)[NR][MV]) const
//     NR outputs: half of them from `first` on, the others from `second`; AHEAD outputs further comes the next tile.
#pragma once

#include <algorithm>

#include "panel.h"
#include "parallel.h"
#include "scratch.h"

struct Linear {
    long rows, in, out;
    const float* bias;      // or null
    const float* residual;  // [rows][out], or null
    float* y;               // [rows][out]
    bool swiglu;            // the weight is [2 * out][in]: gates, then ups
};

constexpr int TASK = 24;
// Outputs of one task, a multiple of every tile's height.
constexpr long PANEL_BYTES = 1 << 20;
// Panels of so many bytes at most are computed with at a time, to stay in the second-level cache.

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

template <int MV, int NR, typename Format>
void tile(const Linear& op, const Format& format, const char* panel, long n, long row, long valid) {
    vf acc[NR][MV];
    if constexpr (NR >= 2) {
        if (op.swiglu) {
            constexpr int R = NR / 2;
            format.template multiply<MV, NR, R>(panel, n, n + op.out, acc);
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
    format.template multiply<MV, NR, NR>(panel, n, n + NR / 2, acc);
    finish<MV, NR>(op, acc, n, row, valid);
}

// Outputs n to `end` for one panel.
template <int MV, typename Format>
void panel_outputs(const Linear& op, const Format& format, const char* panel, long n, long end, long row, long valid) {
#if defined(__AVX512F__)
    constexpr int NR = MV == 1 ? 24 : 12;
#else
    constexpr int NR = MV == 1 ? 12 : MV == 2 ? 6 : 3;
#endif
    constexpr int EVEN = NR == 3 ? 2 : NR;  // gates and ups come in pairs
    if (op.swiglu) {
        for (; n + EVEN / 2 <= end; n += EVEN / 2) tile<MV, EVEN>(op, format, panel, n, row, valid);
        for (; n < end; n++) tile<MV, 2>(op, format, panel, n, row, valid);
        return;
    }
    for (; n + NR <= end; n += NR) tile<MV, NR>(op, format, panel, n, row, valid);
    for (; n < end; n++) tile<MV, 1>(op, format, panel, n, row, valid);
}

// Outputs n to `end` of rows `first` to `last`: their weights stay in the cache from panel to panel.
template <typename Format>
void outputs(const Linear& op, const Format& format, const char* panels, long n, long end, long first, long last) {
    for (long row = first; row < last; row += LANES, panels += format.panel_bytes(LANES)) {
        const long valid = std::min<long>(LANES, last - row);
        switch (panel_vectors(row, last)) {
            case 1: panel_outputs<1>(op, format, panels, n, end, row, valid); break;
            case 2: panel_outputs<2>(op, format, panels, n, end, row, valid); break;
#if !defined(__AVX512F__)
            case 4: panel_outputs<4>(op, format, panels, n, end, row, valid); break;
#endif
        }
    }
}

// y = f(x W^T + bias) + residual.
template <typename Format>
void run_linear(const Linear& op, const Format& format, int threads) {
    static thread_local Scratch scratch;
    const long size = format.panel_bytes(LANES);
    const long most = std::max(PANEL_BYTES / size, 4L) * LANES;
    // Neighbouring outputs go to the same thread: what it asked for early lies in its own cache.
    const long share = std::max(1L, op.out / (TASK * 4L * threads)) * TASK;
    for (long first = 0; first < op.rows; first += most) {
        const long end = std::min(op.rows, first + most);
        const long panels = (end - first + LANES - 1) / LANES;
        char* packed = scratch.bytes(static_cast<size_t>(panels * size));
        Phase packing((panels - 1) * MOST_VECTORS + panel_vectors(first + (panels - 1) * LANES, end));
        Tasks work((op.out + share - 1) / share);
        in_parallel(threads, [&] {
            packing.run([&](long group) {
                const long panel = group / MOST_VECTORS;
                const int lane = static_cast<int>(group % MOST_VECTORS) * W;
                const long row = first + panel * LANES + lane;
                const int count = static_cast<int>(std::clamp<long>(end - row, 0, W));
                format.pack(row, count, packed + panel * size, lane,
                            panel_vectors(first + panel * LANES, end) * W);
            });
            long task;
            while (work.claim(task))
                outputs(op, format, packed, task * share, std::min(op.out, (task + 1) * share), first, end);
        });
    }
}
