// y = x W^T with weights in four-bit NormalFloat: blocks of 64 inputs, value = CODE[q] * scale. Products are of floats.
//
// Every output adds up, block by block, scale * (the sum of CODE[q] * x in the order of the inputs), whatever the
// batch. Few rows: weights go from memory through a look-up straight into the products. Many rows: each task looks its
// weights up once, as floats that lie in the cache from row to row.
#include "epilogue.h"
#include "exports.h"
#include "nf4_weights.h"
#include "row_transforms.h"
#include "scratch.h"
#include "threading.h"

namespace {

// Vectors of outputs that one row is multiplied with at a time: sums enough to keep the processor busy.
constexpr int UNITS_AT_ONCE = 4;
// Rows that are multiplied at once: as many sums as the registers hold. Up to this number look weights up as they use
// them.
#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = 12;
#else
constexpr int ROWS_AT_ONCE = 6;
#endif

struct Nf4Operands {
    const float* x;
    long stride;  // floats from one row to the next
    const float* norm;  // or null
    float eps;
    Nf4Tiles weight;
};

// Rows of x, normalised where a norm comes first, input by input: [inputs][rows], with zeros up to a whole block.
void transpose_rows(const Nf4Operands& from, long first, long rows, long in, float* to) {
    for (long r = 0; r < rows; r++) {
        const float* x = from.x + (first + r) * from.stride;
        const float inverse = from.norm ? inverse_rms(x, in, from.eps) : 1.0f;
        for (long k = 0; k < in; k++) to[k * rows + r] = from.norm ? x[k] * inverse * from.norm[k] : x[k];
    }
    std::fill(to + in * rows, to + from.weight.blocks * NF4_BLOCK * rows, 0.0f);
}

// ROWS prepared rows times COUNT units of outputs. `codes(block, use)` calls use(k, codes) for every input k of a
// block.
template <int ROWS, int COUNT, typename Codes>
INLINE void multiply(const Nf4Tiles& weight, const float* x, const long (&units)[COUNT], Codes&& codes,
                     vf (&total)[ROWS][COUNT]) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int u = 0; u < COUNT; u++) total[r][u] = vf{};
    for (long block = 0; block < weight.blocks; block++) {
        vf acc[ROWS][COUNT];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int u = 0; u < COUNT; u++) acc[r][u] = vf{};
        codes(block, [&](int k, const vf (&w)[COUNT]) INLINE_LAMBDA {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const vf value = splat(x[(block * NF4_BLOCK + k) * ROWS + r]);
#pragma GCC unroll 4
                for (int u = 0; u < COUNT; u++) acc[r][u] = fmadd(w[u], value, acc[r][u]);
            }
        });
#pragma GCC unroll 4
        for (int u = 0; u < COUNT; u++) {
            const vf scale = weight.scales_of(units[u], block);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) total[r][u] = fmadd(acc[r][u], scale, total[r][u]);
        }
    }
}

// Writes a unit's outputs, those of gates with their ups.
INLINE void finish(const GemmProblem& op, long row, long unit, vf value, vf up) {
    const long n = unit * W;
    if (n + W <= op.out)
        store(op.y + row * op.out + n, apply_epilogue(op, row, n, value, up));
    else if (n < op.out)
        store_tail(op, row, n, static_cast<int>(op.out - n), value, up);
}

// The units from `first` on, COUNT in all: with SwiGLU half of them are of ups, `ups` units further.
template <int COUNT>
INLINE void pick_units(const GemmProblem& op, long first, long last, long ups, long (&units)[COUNT]) {
    for (int u = 0; u < COUNT; u++) {
        const int each = op.swiglu ? u % (COUNT / 2) : u;
        units[u] = std::min(first + each, last - 1) + (op.swiglu && u >= COUNT / 2 ? ups : 0);
    }
}

template <int ROWS, int COUNT>
INLINE void finish_all(const GemmProblem& op, long row, long first, long last, const vf (&total)[ROWS][COUNT]) {
    const int own = op.swiglu ? COUNT / 2 : COUNT;
    for (int u = 0; u < own && first + u < last; u++)
        for (int r = 0; r < ROWS; r++)
            finish(op, row + r, first + u, total[r][u], op.swiglu ? total[r][u + COUNT / 2] : vf{});
}

// ROWS rows from memory: COUNT is the units that are multiplied at a time.
template <int ROWS>
__attribute__((noinline)) void few_rows(const GemmProblem& op, const Nf4Tiles& weight, const float* x, long first,
                                        long last, long ups) {
    constexpr int COUNT = ROWS <= 2 ? UNITS_AT_ONCE : 2;
    const int step = op.swiglu ? COUNT / 2 : COUNT;
    const CodeTable table;
    for (; first < last; first += step) {
        long units[COUNT];
        pick_units(op, first, last, ups, units);
        vf total[ROWS][COUNT];
        multiply<ROWS, COUNT>(weight, x, units, [&](long block, auto&& use) INLINE_LAMBDA {
#pragma GCC unroll 1
            for (int line = 0; line < NF4_LINES; line++) {
                vi packed[COUNT];
#pragma GCC unroll 4
                for (int u = 0; u < COUNT; u++) packed[u] = weight.line(units[u], block, line);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    vf w[COUNT];
#pragma GCC unroll 4
                    for (int u = 0; u < COUNT; u++) w[u] = table.look_up(packed[u], i);
                    use(line * 8 + i, w);
                }
            }
        }, total);
        finish_all(op, 0, first, last, total);
    }
}

template <int ROWS = ROWS_AT_ONCE>
void few_rows(long rows, const GemmProblem& op, const Nf4Tiles& weight, const float* x, long first, long last,
              long ups) {
    if (rows == ROWS) return few_rows<ROWS>(op, weight, x, first, last, ups);
    if constexpr (ROWS > 1) few_rows<ROWS - 1>(rows, op, weight, x, first, last, ups);
}

// ROWS rows from `row` on, times two units whose codes are in `panel` [inputs][2].
template <int ROWS>
__attribute__((noinline)) void many_rows(const GemmProblem& op, const Nf4Tiles& weight, const float* x,
                                         const float* panel, long row, long first, long last, const long (&units)[2]) {
    vf total[ROWS][2];
    multiply<ROWS, 2>(weight, x, units, [&](long block, auto&& use) INLINE_LAMBDA {
        const float* from = panel + block * NF4_BLOCK * 2 * W;
#pragma GCC unroll 2
        for (int k = 0; k < NF4_BLOCK; k++) use(k, {load(from + k * 2 * W), load(from + k * 2 * W + W)});
    }, total);
    finish_all(op, row, first, last, total);
}

template <int ROWS = ROWS_AT_ONCE>
void many_rows(long rows, const GemmProblem& op, const Nf4Tiles& weight, const float* x, const float* panel, long row,
               long first, long last, const long (&units)[2]) {
    if (rows == ROWS) return many_rows<ROWS>(op, weight, x, panel, row, first, last, units);
    if constexpr (ROWS > 1) many_rows<ROWS - 1>(rows, op, weight, x, panel, row, first, last, units);
}

// The codes of two units: [inputs][2][W].
void look_up(const Nf4Tiles& weight, const long (&units)[2], float* panel) {
    const CodeTable table;
    for (long block = 0; block < weight.blocks; block++)
        for (int line = 0; line < NF4_LINES; line++)
            for (int u = 0; u < 2; u++) {
                const vi packed = weight.line(units[u], block, line);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++)
                    store(panel + (block * NF4_BLOCK + line * 8 + i) * 2 * W + u * W, table.look_up(packed, i));
            }
}

void run(const GemmProblem& op, const Nf4Operands& from, int threads) {
    static thread_local Scratch scratch;
    const Nf4Tiles& weight = from.weight;
    const long size = weight.blocks * NF4_BLOCK;
    const long units = (op.out + W - 1) / W, ups = units;
    const long most =
        std::max(MAX_PACKED_BYTES / (size * static_cast<long>(sizeof(float)) * ROWS_AT_ONCE), 1L) * ROWS_AT_ONCE;
    for (long begin = 0; begin < op.rows; begin += most) {
        const long count = std::min(most, op.rows - begin);
        const bool few = count <= ROWS_AT_ONCE;
        float* x = scratch.floats(static_cast<size_t>(count * size));
        const GemmProblem part = op.part(begin, count);
        // Neighbouring outputs go to the same thread, which reads on where it was.
        const long at_once = op.swiglu ? 1 : 2;
        const long share = few ? std::max(1L, units / (UNITS_AT_ONCE * 8L * threads)) * UNITS_AT_ONCE : at_once;
        Phase transposing((count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
        TaskQueue work((units + share - 1) / share);
        in_parallel(threads, [&] {
            op.begin_lora();
            transposing.run([&](long group) {
                const long row = group * ROWS_AT_ONCE;
                transpose_rows(from, begin + row, std::min<long>(ROWS_AT_ONCE, count - row), op.in, x + row * size);
            });
            op.finish_lora();
            static thread_local Scratch codes;
            long task;
            while (work.claim(task)) {
                const long first = task * share, last = std::min(units, first + share);
                if (few) {
                    few_rows(count, part, weight, x, first, last, ups);
                    continue;
                }
                long picked[2];
                pick_units(op, first, last, ups, picked);
                float* panel = codes.floats(static_cast<size_t>(size * 2 * W));
                look_up(weight, picked, panel);
                for (long row = 0; row < count; row += ROWS_AT_ONCE)
                    many_rows(std::min<long>(ROWS_AT_ONCE, count - row), part, weight, x + row * size, panel, row,
                              first, last, picked);
            }
        });
    }
}

}  // namespace

void eft_linear_nf4(const float* x, long x_stride, long rows, long in, long out, const void* values,
                    const void* scales, const void*, const float* bias, const float* norm, float eps,
                    const float* residual, float* y, int swiglu, const LoraBatch* lora, int threads) {
    LoraDeltas deltas(lora, {x, x_stride, rows, in, swiglu ? 2 * out : out, norm, eps});
    const Nf4Tiles weight{static_cast<const uint8_t*>(values), static_cast<const float*>(scales),
                          (in + NF4_BLOCK - 1) / NF4_BLOCK};
    run(GemmProblem{rows, in, out, bias, residual, y, swiglu != 0, deltas.get(), deltas.rows()},
        Nf4Operands{x, x_stride, norm, eps, weight}, threads);
}
