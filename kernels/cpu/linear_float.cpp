// y = x W^T with weights in float32 or bfloat16, with what comes before and after it in a decoder layer: a norm of x, a
// bias, SwiGLU, a residual. Weights are read as they lie, [out][in], once for all rows: they are shared with training.
#include "linear.h"

#include "dots.h"
#include "export.h"
#include "norm.h"
#include "parallel.h"
#include "ranges.h"
#include "scratch.h"

namespace {

constexpr long FEATURES = 768;
// Features that a tile goes through at once: so many of its weights stay in the first-level cache from rows to rows.

template <typename T>
struct Floats {
    const float* x;
    long stride;  // floats from one row of x to the next
    const T* weight;
    const float* norm;  // or null
    float eps;
};

// Rows as they are multiplied, after the norm.
struct Batch {
    const float* x;
    long stride, rows, in;

    long tiles() const { return (rows + ROWS - 1) / ROWS; }
};

// What a thread needs for W outputs of a batch.
struct Workspace {
    float* sums;     // [tiles * ROWS][W]
    float* ups;      // the same, for the weight's second half
    float* carried;  // [tiles][OUTPUTS * ROWS][W]: sums over the features so far
    float* wide;     // [OUTPUTS][in]: widened weights

    Workspace(Scratch& scratch, const Batch& batch, bool widens) {
        const long size = batch.tiles() * ROWS * W, all = batch.in > FEATURES ? size * OUTPUTS : 0;
        sums = scratch.floats(static_cast<size_t>(2 * size + all + (widens ? OUTPUTS * batch.in : 0)));
        ups = sums + size;
        carried = ups + size;
        wide = carried + all;
    }
};

template <int R>
void tile(const float* const (&weights)[OUTPUTS], const float* x, long stride, long k, long end, long in, Ahead& ahead,
          float* carried, float* sums) {
    vf acc[OUTPUTS][R];
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS; n++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[n][r] = k == 0 ? vf{} : load(carried + (n * R + r) * W);
    multiply(weights, x, stride, k, end, ahead, acc);
    if (end == in) return add_lanes(acc, sums);
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS; n++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(carried + (n * R + r) * W, acc[n][r]);
}

template <int R, typename T>
__attribute__((noinline)) void stream_tile(const T* const (&weights)[OUTPUTS], const Batch& batch, float* sums) {
    vf acc[OUTPUTS][R];
    stream(weights, batch.x, batch.stride, batch.in, acc);
    add_lanes(acc, sums);
}

// Where OUTPUTS rows of weights begin; those that there are not are the last one again.
template <typename T>
struct Strip {
    Strip(const T* weight, long in, long count) {
        for (int n = 0; n < OUTPUTS; n++) weights[n] = weight + std::min<long>(n, count - 1) * in;
    }

    const T* weights[OUTPUTS];
};

// `count` <= OUTPUTS outputs of all rows, from `weight` on, into `sums`.
template <typename T>
void multiply_many(const Batch& batch, const T* weight, long count, const Workspace& space, float* sums) {
    const long in = batch.in, tiles = batch.tiles();
    const Strip strip(as_floats(weight, count * in, space.wide), in, count);
    // In equal parts, each a multiple of W.
    const long parts = (in + FEATURES - 1) / FEATURES, width = (in + parts * W - 1) / (parts * W) * W;
    // The next strip is asked for as evenly as this one is computed with: then memory is busy all the time.
    constexpr long LINES = OUTPUTS * W * static_cast<long>(sizeof(T)) / 64;
    const long lines = (LINES + tiles - 1) / tiles;
    const char* next = reinterpret_cast<const char*>(weight + OUTPUTS * in);
    for (long k = 0; k < in; k += width) {
        const long end = std::min(in, k + width);
        Ahead ahead{next + k * OUTPUTS * static_cast<long>(sizeof(T)), lines};
        const char* enough = next + end * OUTPUTS * static_cast<long>(sizeof(T));
        for (long t = 0; t < tiles; t++) {
            const float* x = batch.x + t * ROWS * batch.stride;
            float* carried = space.carried + t * OUTPUTS * ROWS * W;
            float* to = sums + t * ROWS * W;
            if (ahead.from >= enough) ahead.lines = 0;
            switch (std::min<long>(ROWS, batch.rows - t * ROWS)) {
                case 1: tile<1>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
                case 2: tile<2>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
                case 3: tile<3>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
            }
        }
    }
}

template <typename T>
void multiply_strip(const Batch& batch, const T* weight, long count, const Workspace& space, float* sums) {
    static_assert(ROWS == 3);
    if (batch.rows > ROWS) return multiply_many(batch, weight, count, space, sums);
    const Strip strip(weight, batch.in, count);
    switch (batch.rows) {
        case 1: stream_tile<1>(strip.weights, batch, sums); break;
        case 2: stream_tile<2>(strip.weights, batch, sums); break;
        case 3: stream_tile<3>(strip.weights, batch, sums); break;
    }
}

// W outputs from n on, of all rows.
template <typename T>
void compute(const Linear& op, const Batch& batch, const T* weight, long n, const Workspace& space) {
    const long count = std::min<long>(W, op.out - n);
    for (long done = 0; done < count; done += OUTPUTS) {
        const long some = std::min<long>(OUTPUTS, count - done), at = n + done;
        multiply_strip(batch, weight + at * op.in, some, space, space.sums + done);
        if (op.swiglu) multiply_strip(batch, weight + (op.out + at) * op.in, some, space, space.ups + done);
    }
    for (long row = 0; row < op.rows; row++) {
        const vf value = load(space.sums + row * W), up = op.swiglu ? load(space.ups + row * W) : vf{};
        if (count == W)
            store(op.y + row * op.out + n, finished(op, row, n, value, up));
        else
            finish_rest(op, row, n, static_cast<int>(count), value, up);
    }
}

constexpr long AT_ONCE = 8;
// Rows that a thread normalises at a time.

// All rows of `op`, which are few enough.
template <typename T>
void run_some(const Linear& op, const Floats<T>& from, int threads) {
    static thread_local Scratch normed;
    Batch batch{from.x, from.stride, op.rows, op.in};
    float* to = nullptr;
    if (from.norm) {
        batch.stride = (op.in + W - 1) / W * W;
        batch.x = to = normed.floats(static_cast<size_t>(op.rows * batch.stride));
    }
    const auto norms = [&](long first, long last) {
        for (long row = first; row < last; row++)
            normalise(from.x + row * from.stride, op.in, from.norm, 0.0f, from.eps, to + row * batch.stride);
    };
    const bool together = from.norm && op.rows > AT_ONCE;
    if (from.norm && !together) norms(0, op.rows);
    Phase normalising(together ? (op.rows + AT_ONCE - 1) / AT_ONCE : 0);
    const long tasks = (op.out + W - 1) / W;
    threads = static_cast<int>(std::min<long>(threads, tasks));
    Ranges ranges(tasks, threads);
    in_parallel(threads, [&] {
        static thread_local Scratch scratch;
        const Workspace space(scratch, batch, sizeof(T) != sizeof(float));
        if (together)
            normalising.run([&](long task) { norms(task * AT_ONCE, std::min(op.rows, (task + 1) * AT_ONCE)); });
        ranges.run([&](long task, bool) { compute(op, batch, from.weight, task * W, space); });
    });
}

template <typename T>
void run(const Linear& op, Floats<T> from, int threads) {
    const long most = std::max(PANEL_BYTES / (std::max(op.in, 1L) * static_cast<long>(sizeof(float))), 32L);
    for (long first = 0; first < op.rows; first += most) {
        Linear part = op;
        part.rows = std::min(most, op.rows - first);
        part.y += first * op.out;
        if (op.residual) part.residual += first * op.out;
        run_some(part, from, threads);
        from.x += part.rows * from.stride;
    }
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
