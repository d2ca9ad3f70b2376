// y = x W^T with weights in float32 or bfloat16, with what comes before and after it in a decoder layer: a norm of x, a
// bias, SwiGLU, a residual. Weights are read as they lie, [out][in], once for all rows.
//
// Every output is one sum in the order of its features, whatever else is in the batch. Many rows: a vector holds the
// same feature of W rows, and weights are broadcast. Few rows: a vector holds the same feature of W outputs, turned in
// registers, and activations are broadcast; memory then is what limits.
#include "linear.h"

#include "export.h"
#include "floats.h"
#include "panel.h"
#include "parallel.h"
#include "scratch.h"

namespace {

constexpr int TASK = 24;
// Outputs of one task, a multiple of every tile's height.

#if defined(__AVX512F__)
constexpr int FEW = 10;
#else
constexpr int FEW = 4;
#endif
// Up to so many rows it is the weights that are turned: more sums would not fit in the registers.

template <typename T>
struct Floats {
    const float* x;
    long stride;  // floats from one row of x to the next
    const T* weight;
    const float* norm;  // or null
    float eps;
};

// Weights of `count` outputs from n on, and with SwiGLU those of their ups.
struct Strip {
    const float* first;
    const float* second;
};

// NR outputs of MV * W rows: half of them from `strip.first` on, the others from `strip.second`. `ahead` floats further
// comes what is needed next.
template <int MV, int NR>
INLINE void multiply(const float* panel, const Strip& strip, long in, long ahead, vf (&acc)[NR][MV]) {
    constexpr int HALF = NR / 2;
#pragma GCC unroll 24
    for (int n = 0; n < NR; n++)
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) acc[n][m] = vf{};
    const auto row_of = [&](int n) INLINE_LAMBDA {
        return n < HALF ? strip.first + n * in : strip.second + (n - HALF) * in;
    };
    const auto step = [&](long k) INLINE_LAMBDA {
        vf x[MV];
#pragma GCC unroll 4
        for (int m = 0; m < MV; m++) x[m] = load(panel + (k * MV + m) * W);
#pragma GCC unroll 24
        for (int n = 0; n < NR; n++) {
            const vf w = splat(row_of(n)[k]);
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) acc[n][m] += w * x[m];
        }
    };
    long k = 0;
    for (; k + LINE <= in; k += LINE) {
        // The hardware does not follow so many rows at once: ask for the next tile's while this one is used.
#pragma GCC unroll 24
        for (int n = 0; n < NR; n++) prefetch(row_of(n) + ahead + k);
        for (long i = k; i < k + LINE; i++) step(i);
    }
    for (; k < in; k++) step(k);
}

// Writes R outputs of up to MV * W rows.
template <bool SWIGLU, int MV, int R>
INLINE void finish(const Linear& op, const vf (&acc)[R][MV], const vf (&ups)[R][MV], long n, long row, long valid) {
#pragma GCC unroll 4
    for (int m = 0; m < MV; m++)
#pragma GCC unroll 6
        for (int j = 0; j < R; j += W) {
            vf block[W], second[W] = {};
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                block[i] = j + i < R ? acc[j + i < R ? j + i : 0][m] : vf{};
                if constexpr (SWIGLU) second[i] = ups[j + i < R ? j + i : 0][m];
            }
            transpose(block);
            if constexpr (SWIGLU) transpose(second);
            alignas(64) float turned[W][W], turned_ups[SWIGLU ? W : 1][W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                store(turned[i], block[i]);
                if constexpr (SWIGLU) store(turned_ups[i], second[i]);
            }
            const int width = std::min(W, R - j);
            const long lanes = std::min<long>(W, valid - m * W);
            for (long lane = 0; lane < lanes; lane++) {
                const long at = row + m * W + lane;
                const vf value = load(turned[lane]), up = SWIGLU ? load(turned_ups[SWIGLU ? lane : 0]) : vf{};
                if (width == W)
                    store(op.y + at * op.out + n + j, finished(op, at, n + j, value, up));
                else
                    finish_rest(op, at, n + j, width, value, up);
            }
        }
}

template <int MV, int NR>
void tile(const Linear& op, const float* panel, const Strip& strip, long n, long row, long valid) {
    vf acc[NR][MV];
    if constexpr (NR >= 2) {
        if (op.swiglu) {
            constexpr int R = NR / 2;
            multiply<MV, NR>(panel, strip, op.in, R * op.in, acc);
            vf gates[R][MV], ups[R][MV];
#pragma GCC unroll 12
            for (int j = 0; j < R; j++)
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) {
                    gates[j][m] = acc[j][m];
                    ups[j][m] = acc[j + R][m];
                }
            finish<true, MV, R>(op, gates, ups, n, row, valid);
            return;
        }
    }
    multiply<MV, NR>(panel, {strip.first, strip.first + NR / 2 * op.in}, op.in, NR * op.in, acc);
    finish<false, MV, NR>(op, acc, acc, n, row, valid);
}

// Outputs n to `end` for one panel.
template <int MV>
void panel_outputs(const Linear& op, const float* panel, Strip strip, long n, long end, long row, long valid) {
#if defined(__AVX512F__)
    constexpr int NR = MV == 1 ? 24 : 12;
#else
    constexpr int NR = MV == 1 ? 12 : MV == 2 ? 6 : 3;
#endif
    constexpr int EVEN = NR == 3 ? 2 : NR;  // gates and ups come in pairs
    const auto advance = [&](int count) INLINE_LAMBDA {
        n += count;
        strip.first += count * op.in;
        strip.second += count * op.in;
    };
    if (op.swiglu) {
        for (; n + EVEN / 2 <= end; advance(EVEN / 2)) tile<MV, EVEN>(op, panel, strip, n, row, valid);
        for (; n < end; advance(1)) tile<MV, 2>(op, panel, strip, n, row, valid);
        return;
    }
    for (; n + NR <= end; advance(NR)) tile<MV, NR>(op, panel, strip, n, row, valid);
    for (; n < end; advance(1)) tile<MV, 1>(op, panel, strip, n, row, valid);
}

// Outputs n to `end` of rows `first` to `last`: their weights stay in the cache from panel to panel.
void outputs(const Linear& op, const Strip& strip, const float* panels, long n, long end, long first, long last) {
    for (long row = first; row < last; row += LANES, panels += LANES * op.in) {
        const long valid = std::min<long>(LANES, last - row);
        switch (panel_vectors(row, last)) {
            case 1: panel_outputs<1>(op, panels, strip, n, end, row, valid); break;
            case 2: panel_outputs<2>(op, panels, strip, n, end, row, valid); break;
#if !defined(__AVX512F__)
            case 4: panel_outputs<4>(op, panels, strip, n, end, row, valid); break;
#endif
        }
    }
}

template <typename T>
void run_many(const Linear& op, const Floats<T>& from, int threads) {
    static thread_local Scratch scratch;
    const long size = LANES * op.in;
    const long most = std::max(PANEL_BYTES / (size * static_cast<long>(sizeof(float))), 4L) * LANES;
    // Neighbouring outputs go to the same thread: what it asked for early lies in its own cache.
    const long share = std::max(1L, op.out / (TASK * 4L * threads)) * TASK;
    // Widened weights are used while they lie in the cache: a few at a time.
    const long at_once = sizeof(T) == sizeof(float) ? share : TASK;
    for (long first = 0; first < op.rows; first += most) {
        const long end = std::min(op.rows, first + most);
        const long panels = (end - first + LANES - 1) / LANES;
        float* packed = scratch.floats(static_cast<size_t>(panels * size));
        Phase packing((panels - 1) * MOST_VECTORS + panel_vectors(first + (panels - 1) * LANES, end));
        Tasks work((op.out + share - 1) / share);
        in_parallel(threads, [&] {
            packing.run([&](long group) {
                const long panel = group / MOST_VECTORS;
                const int lane = static_cast<int>(group % MOST_VECTORS) * W;
                const long row = first + panel * LANES + lane;
                const int count = static_cast<int>(std::clamp<long>(end - row, 0, W));
                pack_rows(from.x + row * from.stride, from.stride, count, op.in, from.norm, from.eps,
                          packed + panel * size + lane, panel_vectors(first + panel * LANES, end) * W);
            });
            static thread_local Scratch widened;
            float* wide = nullptr;
            if (at_once < share || sizeof(T) != sizeof(float))
                wide = widened.floats(static_cast<size_t>(2 * at_once * op.in));
            long task;
            while (work.claim(task)) {
                const long stop = std::min(op.out, (task + 1) * share);
                for (long n = task * share; n < stop; n += at_once) {
                    const long count = std::min(at_once, stop - n);
                    Strip strip{as_floats(from.weight + n * op.in, count * op.in, wide), nullptr};
                    strip.second = strip.first;
                    if (op.swiglu)
                        strip.second = as_floats(from.weight + (op.out + n) * op.in, count * op.in,
                                                 wide + (wide ? at_once * op.in : 0));
                    outputs(op, strip, packed, n, n + count, first, end);
                }
            }
        });
    }
}

// R rows, packed as [in][W], times `count` <= W outputs from `weight` on.
template <int R, typename T>
INLINE void multiply_few(const float* panel, const T* weight, int count, long in, vf (&acc)[R]) {
    const T* rows[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = weight + std::min(i, count - 1) * in;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r] = vf{};
    long k = 0;
    for (; k + W <= in; k += W) {
        vf turned[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            prefetch(rows[i] + W * in + k);
            turned[i] = load_weights(rows[i] + k);
        }
        transpose(turned);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r] += turned[i] * splat(panel[(k + i) * W + r]);
    }
    for (; k < in; k++) {
        vf w;
        for (int i = 0; i < W; i++) w[i] = load_weight(rows[i] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r] += w * splat(panel[k * W + r]);
    }
}

template <int R, typename T>
__attribute__((noinline)) void few_outputs(const Linear& op, const T* weight, const float* panel, long n, long end) {
    for (; n < end; n += W) {
        const int count = static_cast<int>(std::min<long>(W, end - n));
        vf acc[R], ups[R] = {};
        multiply_few<R>(panel, weight + n * op.in, count, op.in, acc);
        if (op.swiglu) multiply_few<R>(panel, weight + (op.out + n) * op.in, count, op.in, ups);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vf up = op.swiglu ? ups[r] : vf{};
            if (count == W)
                store(op.y + r * op.out + n, finished(op, r, n, acc[r], up));
            else
                finish_rest(op, r, n, count, acc[r], up);
        }
    }
}

template <int R = FEW, typename T>
void few_outputs(long rows, const Linear& op, const T* weight, const float* panel, long n, long end) {
    if (rows == R) return few_outputs<R, T>(op, weight, panel, n, end);
    if constexpr (R > 1) few_outputs<R - 1>(rows, op, weight, panel, n, end);
}

template <typename T>
void run_few(const Linear& op, const Floats<T>& from, int threads) {
    static thread_local Scratch scratch;
    float* panel = scratch.floats(static_cast<size_t>(W * op.in));
    pack_rows(from.x, from.stride, static_cast<int>(op.rows), op.in, from.norm, from.eps, panel, W);
    const long share = std::max(1L, op.out / (W * 4L * threads)) * W;
    for_each(threads, (op.out + share - 1) / share, [&](long task) {
        few_outputs(op.rows, op, from.weight, panel, task * share, std::min(op.out, (task + 1) * share));
    });
}

template <typename T>
void run(const Linear& op, const Floats<T>& from, int threads) {
    if (op.rows == 0) return;
    if (op.rows <= FEW)
        run_few(op, from, threads);
    else
        run_many(op, from, threads);
}

}  // namespace

// y [rows, out] = f(norm(x) W^T + bias) + residual; see `Linear` and `Floats` for the arguments.
EXPORT void eft_linear(const float* x, long stride, long rows, long in, long out, const float* weight,
                       const float* bias, const float* norm, float eps, const float* residual, float* y, int swiglu,
                       int threads) {
    run(Linear{rows, in, out, bias, residual, y, swiglu != 0}, Floats<float>{x, stride, weight, norm, eps}, threads);
}

// The same with weights in bfloat16.
EXPORT void eft_linear_bfloat16(const float* x, long stride, long rows, long in, long out, const uint16_t* weight,
                                const float* bias, const float* norm, float eps, const float* residual, float* y,
                                int swiglu, int threads) {
    run(Linear{rows, in, out, bias, residual, y, swiglu != 0}, Floats<uint16_t>{x, stride, weight, norm, eps},
        threads);
}
