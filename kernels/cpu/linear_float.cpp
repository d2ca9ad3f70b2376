// y = x W^T with weights in float32 or bfloat16, with what comes before and after it in a decoder layer: a norm of x, a
// bias, SwiGLU, a residual. Weights are read as they lie, [out][in], once for all rows: they are shared with training.
#include "epilogue.h"

#include "exports.h"
#include "float_dot.h"
#include "row_transforms.h"
#include "scratch.h"
#include "threading.h"

namespace {

// Features that a tile goes through at once: its weights for them stay in the first-level cache from rows to rows.
constexpr long FEATURES_PER_PASS = 768;

template <typename T>
struct FloatOperands {
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

    long tiles() const { return (rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE; }
};

// Memory of a thread for W outputs of a batch.
struct Workspace {
    float* sums;     // [tiles * ROWS_PER_TILE][W]
    float* ups;      // the same, for the weight's second half
    float* carried;  // [tiles][OUTPUTS_PER_TILE * ROWS_PER_TILE][W]: sums over the features so far
    float* wide;     // [OUTPUTS_PER_TILE][in]: widened weights

    Workspace(Scratch& scratch, const Batch& batch, bool widens) {
        const long size = batch.tiles() * ROWS_PER_TILE * W,
                   all = batch.in > FEATURES_PER_PASS ? size * OUTPUTS_PER_TILE : 0;
        sums = scratch.floats(static_cast<size_t>(2 * size + all + (widens ? OUTPUTS_PER_TILE * batch.in : 0)));
        ups = sums + size;
        carried = ups + size;
        wide = carried + all;
    }
};

template <int R>
void tile(const float* const (&weights)[OUTPUTS_PER_TILE], const float* x, long stride, long k, long end, long in,
          Prefetcher& ahead, float* carried, float* sums) {
    vf acc[OUTPUTS_PER_TILE][R];
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS_PER_TILE; n++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[n][r] = k == 0 ? vf{} : load(carried + (n * R + r) * W);
    multiply(weights, x, stride, k, end, ahead, acc);
    if (end == in) return sum_lanes(acc, sums);
#pragma GCC unroll 8
    for (int n = 0; n < OUTPUTS_PER_TILE; n++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store(carried + (n * R + r) * W, acc[n][r]);
}

template <int R, typename T>
__attribute__((noinline)) void stream_tile(const T* const (&weights)[OUTPUTS_PER_TILE], const Batch& batch,
                                           float* sums) {
    vf acc[OUTPUTS_PER_TILE][R];
    multiply_from_memory(weights, batch.x, batch.stride, batch.in, acc);
    sum_lanes(acc, sums);
}

// The beginnings of OUTPUTS_PER_TILE rows of weights; beyond the last row they are that row again.
template <typename T>
struct OutputStrip {
    OutputStrip(const T* weight, long in, long count) {
        for (int n = 0; n < OUTPUTS_PER_TILE; n++) weights[n] = weight + std::min<long>(n, count - 1) * in;
    }

    const T* weights[OUTPUTS_PER_TILE];
};

// `count` <= OUTPUTS_PER_TILE outputs of all rows, from `weight` on, into `sums`.
template <typename T>
void multiply_many(const Batch& batch, const T* weight, long count, const Workspace& space, float* sums) {
    const long in = batch.in, tiles = batch.tiles();
    const OutputStrip strip(as_floats(weight, count * in, space.wide), in, count);
    // In equal parts, each a multiple of W.
    const long parts = (in + FEATURES_PER_PASS - 1) / FEATURES_PER_PASS, width = (in + parts * W - 1) / (parts * W) * W;
    // The next strip is asked for as evenly as this one is computed with: then memory is busy all the time.
    constexpr long LINES = OUTPUTS_PER_TILE * W * static_cast<long>(sizeof(T)) / 64;
    const long lines = (LINES + tiles - 1) / tiles;
    const char* next = reinterpret_cast<const char*>(weight + OUTPUTS_PER_TILE * in);
    for (long k = 0; k < in; k += width) {
        const long end = std::min(in, k + width);
        Prefetcher ahead{next + k * OUTPUTS_PER_TILE * static_cast<long>(sizeof(T)), lines};
        const char* enough = next + end * OUTPUTS_PER_TILE * static_cast<long>(sizeof(T));
        for (long t = 0; t < tiles; t++) {
            const float* x = batch.x + t * ROWS_PER_TILE * batch.stride;
            float* carried = space.carried + t * OUTPUTS_PER_TILE * ROWS_PER_TILE * W;
            float* to = sums + t * ROWS_PER_TILE * W;
            if (ahead.from >= enough) ahead.lines = 0;
            switch (std::min<long>(ROWS_PER_TILE, batch.rows - t * ROWS_PER_TILE)) {
                case 1: tile<1>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
                case 2: tile<2>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
                case 3: tile<3>(strip.weights, x, batch.stride, k, end, in, ahead, carried, to); break;
            }
        }
    }
}

template <typename T>
void multiply_strip(const Batch& batch, const T* weight, long count, const Workspace& space, float* sums) {
    static_assert(ROWS_PER_TILE == 3);
    if (batch.rows > ROWS_PER_TILE) return multiply_many(batch, weight, count, space, sums);
    const OutputStrip strip(weight, batch.in, count);
    switch (batch.rows) {
        case 1: stream_tile<1>(strip.weights, batch, sums); break;
        case 2: stream_tile<2>(strip.weights, batch, sums); break;
        case 3: stream_tile<3>(strip.weights, batch, sums); break;
    }
}

// W outputs from n on, of all rows.
template <typename T>
void compute(const GemmProblem& op, const Batch& batch, const T* weight, long n, const Workspace& space) {
    const long count = std::min<long>(W, op.out - n);
    for (long done = 0; done < count; done += OUTPUTS_PER_TILE) {
        const long some = std::min<long>(OUTPUTS_PER_TILE, count - done), at = n + done;
        multiply_strip(batch, weight + at * op.in, some, space, space.sums + done);
        if (op.swiglu) multiply_strip(batch, weight + (op.out + at) * op.in, some, space, space.ups + done);
    }
    for (long row = 0; row < op.rows; row++) {
        const vf value = load(space.sums + row * W), up = op.swiglu ? load(space.ups + row * W) : vf{};
        if (count == W)
            store(op.y + row * op.out + n, apply_epilogue(op, row, n, value, up));
        else
            store_tail(op, row, n, static_cast<int>(count), value, up);
    }
}

// Rows that a thread normalises at a time.
constexpr long NORM_ROWS_PER_TASK = 8;

// All rows of `op`, which are few enough.
template <typename T>
void run_rows(const GemmProblem& op, const FloatOperands<T>& from, int threads) {
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
    const bool together = from.norm && op.rows > NORM_ROWS_PER_TASK;
    if (from.norm && !together) norms(0, op.rows);
    Phase normalising(together ? (op.rows + NORM_ROWS_PER_TASK - 1) / NORM_ROWS_PER_TASK : 0);
    const long tasks = (op.out + W - 1) / W;
    threads = static_cast<int>(std::min<long>(threads, tasks));
    WorkStealingRanges ranges(tasks, threads);
    in_parallel(threads, [&] {
        static thread_local Scratch scratch;
        const Workspace space(scratch, batch, sizeof(T) != sizeof(float));
        op.begin_lora();
        if (together)
            normalising.run([&](long task) {
                norms(task * NORM_ROWS_PER_TASK, std::min(op.rows, (task + 1) * NORM_ROWS_PER_TASK));
            });
        op.finish_lora();
        ranges.run([&](long task, bool) { compute(op, batch, from.weight, task * W, space); });
    });
}

template <typename T>
void run(const GemmProblem& op, FloatOperands<T> from, int threads) {
    const long most = std::max(MAX_PACKED_BYTES / (std::max(op.in, 1L) * static_cast<long>(sizeof(float))), 32L);
    for (long first = 0; first < op.rows; first += most) {
        const GemmProblem part = op.part(first, std::min(most, op.rows - first));
        run_rows(part, from, threads);
        from.x += part.rows * from.stride;
    }
}

}  // namespace

void eft_linear_float32(const float* x, long x_stride, long rows, long in, long out, const void* values,
                        const void*, const void*, const float* bias, const float* norm, float eps,
                        const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run(GemmProblem{rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
        FloatOperands<float>{x, x_stride, static_cast<const float*>(values), norm, eps}, threads);
}

void eft_linear_bfloat16(const float* x, long x_stride, long rows, long in, long out, const void* values,
                         const void*, const void*, const float* bias, const float* norm, float eps,
                         const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    run(GemmProblem{rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
        FloatOperands<uint16_t>{x, x_stride, static_cast<const uint16_t*>(values), norm, eps}, threads);
}
