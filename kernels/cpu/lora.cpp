// Low-rank adapters of a mixed batch: y += (scales * x A^T) B^T for the tokens of every segment, in two phases. First all
// segments are shrunk, then all are expanded.
//
// A token's result is the same bits whatever its batch: shrunk values are sums in W lanes along the inputs, which are
// then added in halves; of an output the ranks are added in their order, and the sum to what was there.
#include <vector>

#include "exports.h"
#include "lora.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

static_assert(sizeof(void*) == sizeof(int64_t), "tables of addresses are of int64");

struct Part {
    const float* b;  // [rank][out]
    int64_t rank, out, column;
};

// As `LoraLayout` writes them in Python: the parts follow.
struct Factors {
    const float* a;  // [rank][in], of all parts
    const float* scales;
    int64_t rank, parts;

    const Part& part(long index) const { return reinterpret_cast<const Part*>(this + 1)[index]; }
};

namespace {

constexpr long TOKENS = 16;
constexpr long RANKS = 16;
constexpr long OUTPUTS = 512;
// Of a task at most; it is shrunk values or outputs that it makes.
constexpr long SMALL = 32768;
// Below so many numbers to be read waking the other threads takes longer than the work.

// Tokens `begin` to `end` of a segment, and of its ranks or of a part's outputs those from `first` to `last`.
struct Task {
    const Segment* segment;
    float* narrow;  // [count][rank]: the segment's shrunk values
    long begin, end, first, last;
    const Part* part;
    long skipped;  // ranks of the parts before
};

INLINE vf load_some(const float* from, long count) {
    float some[W] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(float));
    return load(some);
}

// The products of TOGETHER rows of x with W / TOGETHER rows of a, one a lane.
template <int TOGETHER>
INLINE vf products(const float* const* x, const float* const* a, long in) {
    constexpr int OTHERS = W / TOGETHER;
    vf lanes[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) lanes[i] = vf{};
    const auto step = [&](auto&& get) INLINE_LAMBDA {
        vf left[TOGETHER], right[OTHERS];
#pragma GCC unroll 16
        for (int i = 0; i < TOGETHER; i++) left[i] = get(x[i]);
#pragma GCC unroll 16
        for (int j = 0; j < OTHERS; j++) right[j] = get(a[j]);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) lanes[i] = fused(left[i / OTHERS], right[i % OTHERS], lanes[i]);
    };
    long k = 0;
    for (; k + W <= in; k += W) {
        // Factors of many adapters come from memory: ask for the next rows' while these are used.
#pragma GCC unroll 16
        for (int j = 0; j < OTHERS; j++) prefetch(a[j] + OTHERS * in + k);
        step([&](const float* from) INLINE_LAMBDA { return load(from + k); });
    }
    if (k < in) step([&](const float* from) INLINE_LAMBDA { return load_some(from + k, in - k); });
    return sums(lanes);
}

template <int TOGETHER>
void shrink(const Task& task, const float* x, long stride, long in, long begin) {
    constexpr int OTHERS = W / TOGETHER;
    const Factors& factors = *task.segment->factors;
    const float* rows[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) rows[i] = x + task.segment->token(begin + i) * stride;
    for (long rank = task.first; rank < task.last; rank += OTHERS) {
        const float* others[OTHERS];
        for (int j = 0; j < OTHERS; j++) others[j] = factors.a + std::min(rank + j, task.last - 1) * in;
        float found[W];
        store(found, products<TOGETHER>(rows, others, in));
        for (int i = 0; i < W; i++)
            if (const long at = rank + i % OTHERS; at < task.last)
                task.narrow[(begin + i / OTHERS) * factors.rank + at] = found[i] * factors.scales[at];
    }
}

// Adds VECTORS * W outputs from n on to TOGETHER tokens, or fewer of the last vector: `width` in all.
template <int TOGETHER, int VECTORS>
INLINE void add_outputs(const Part& part, const float* narrow, long stride, float* const* y, long n, long width) {
    const long rest = width - (VECTORS - 1) * W;
    vf acc[TOGETHER][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[i][v] = vf{};
    for (long rank = 0; rank < part.rank; rank++) {
        const float* from = part.b + rank * part.out + n;
        vf b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) prefetch(from + (2 * VECTORS + v) * W);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            b[v] = rest < W && v == VECTORS - 1 ? load_some(from + v * W, rest) : load(from + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[i][v] = fused(b[v], splat(narrow[i * stride + rank]), acc[i][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float* to = y[i] + n + v * W;
            if (rest < W && v == VECTORS - 1) {
                const vf all = load_some(to, rest) + acc[i][v];
                std::memcpy(to, &all, static_cast<size_t>(rest) * sizeof(float));
            } else {
                store(to, load(to) + acc[i][v]);
            }
        }
}

template <int TOGETHER>
void expand(const Task& task, float* y, long stride, long begin) {
    constexpr int VECTORS = W == 16 ? 4 : 2;
    const long width = task.segment->factors->rank;
    const float* narrow = task.narrow + begin * width + task.skipped;
    float* rows[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) rows[i] = y + task.segment->token(begin + i) * stride + task.part->column;
    long n = task.first;
    for (; n + VECTORS * W <= task.last; n += VECTORS * W)
        add_outputs<TOGETHER, VECTORS>(*task.part, narrow, width, rows, n, VECTORS * W);
    for (; n + W <= task.last; n += W) add_outputs<TOGETHER, 1>(*task.part, narrow, width, rows, n, W);
    if (n < task.last) add_outputs<TOGETHER, 1>(*task.part, narrow, width, rows, n, task.last - n);
}

// Calls four(first), two(first) or one(first) for the tokens of a task, so many at a time.
template <typename Four, typename Two, typename One>
INLINE void by_tokens(const Task& task, Four&& four, Two&& two, One&& one) {
    long begin = task.begin;
    for (; begin + 4 <= task.end; begin += 4) four(begin);
    for (; begin + 2 <= task.end; begin += 2) two(begin);
    if (begin < task.end) one(begin);
}

// Appends tasks for all tokens of a segment, for numbers 0 to `size` of which a task has at most `most`.
void cut(std::vector<Task>& tasks, const Task& whole, long size, long most) {
    for (long begin = 0; begin < whole.segment->count; begin += TOKENS)
        for (long first = 0; first < size; first += most) {
            tasks.push_back(whole);
            tasks.back().begin = begin;
            tasks.back().end = std::min(begin + TOKENS, whole.segment->count);
            tasks.back().first = first;
            tasks.back().last = std::min(first + most, size);
        }
}

}  // namespace

// x [.., in], y [.., out], their strides from one token to the next in floats; `table` [segments].
EXPORT void eft_lora_apply(const float* x, long x_stride, long in, float* y, long y_stride, const void* table,
                           long segments, int threads) {
    static thread_local Scratch scratch;
    const Segment* all = static_cast<const Segment*>(table);
    long space = 0, numbers = 0;
    for (long i = 0; i < segments; i++) space += all[i].count * all[i].factors->rank;
    float* narrow = scratch.floats(static_cast<size_t>(space));
    std::vector<Task> shrinking, expanding;
    for (long i = 0; i < segments; i++) {
        const Factors& factors = *all[i].factors;
        Task task{&all[i], narrow, 0, 0, 0, 0, nullptr, 0};
        cut(shrinking, task, factors.rank, RANKS);
        for (long p = 0; p < factors.parts; p++) {
            task.part = &factors.part(p);
            cut(expanding, task, task.part->out, OUTPUTS);
            task.skipped += task.part->rank;
            numbers += task.part->rank * task.part->out * ((all[i].count + 3) / 4);
        }
        narrow += all[i].count * factors.rank;
        numbers += factors.rank * in * ((all[i].count + 3) / 4);
    }
    Phase shrinks(static_cast<long>(shrinking.size()));
    Tasks expands(static_cast<long>(expanding.size()));
    in_parallel(numbers < SMALL ? 1 : threads, [&] {
        shrinks.run([&](long index) {
            const Task& task = shrinking[static_cast<size_t>(index)];
            by_tokens(
                task, [&](long begin) { shrink<4>(task, x, x_stride, in, begin); },
                [&](long begin) { shrink<2>(task, x, x_stride, in, begin); },
                [&](long begin) { shrink<1>(task, x, x_stride, in, begin); });
        });
        long index;
        while (expands.claim(index)) {
            const Task& task = expanding[static_cast<size_t>(index)];
            by_tokens(
                task, [&](long begin) { expand<4>(task, y, y_stride, begin); },
                [&](long begin) { expand<2>(task, y, y_stride, begin); },
                [&](long begin) { expand<1>(task, y, y_stride, begin); });
        }
    });
}
