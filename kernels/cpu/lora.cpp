// Low-rank adapters of a mixed batch: y += (scales * x A^T) B^T for the tokens of every segment, in two phases. First
// all segments are shrunk, then all are expanded.
//
// A token's result is the same bits whatever its batch: shrunk values are sums in W lanes along the inputs, which are
// then added in halves; of an output the ranks are added in their order, and the sum to what was there.
#include <vector>

#include "exports.h"
#include "scratch.h"
#include "simd.h"
#include "threading.h"

namespace {

// Size of a task at most: tokens, and ranks of shrunk values or outputs.
constexpr long MAX_TOKENS_PER_TASK = 16;
constexpr long MAX_RANKS_PER_TASK = 16;
constexpr long MAX_OUTPUTS_PER_TASK = 512;
// Numbers to be read below which waking the other threads takes longer than the work.
constexpr long MIN_PARALLEL_NUMBERS = 32768;

// Tokens `begin` to `end` of a segment, and of its ranks or of a part's outputs those from `first` to `last`.
struct LoraTask {
    const LoraTokens* segment;
    float* shrunk;  // [count][rank]: the segment's shrunk values
    long begin, end, first, last;
    const LoraPart* part;
    long skipped;  // ranks of the parts before
};

// Index into the batch of a segment's token.
INLINE long token_of(const LoraTokens& segment, long i) { return segment.tokens ? segment.tokens[i] : i; }

INLINE vf load_some(const float* from, long count) {
    float some[W] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(float));
    return load(some);
}

// The products of TOKENS rows of x with W / TOKENS rows of a, one a lane.
template <int TOKENS>
INLINE vf products(const float* const* x, const float* const* a, long in) {
    constexpr int RANKS = W / TOKENS;
    vf lanes[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) lanes[i] = vf{};
    const auto step = [&](auto&& get) INLINE_LAMBDA {
        vf left[TOKENS], right[RANKS];
#pragma GCC unroll 16
        for (int i = 0; i < TOKENS; i++) left[i] = get(x[i]);
#pragma GCC unroll 16
        for (int j = 0; j < RANKS; j++) right[j] = get(a[j]);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) lanes[i] = fmadd(left[i / RANKS], right[i % RANKS], lanes[i]);
    };
    long k = 0;
    for (; k + W <= in; k += W) {
        // Factors of many adapters come from memory: prefetch the next rows' while these are used.
#pragma GCC unroll 16
        for (int j = 0; j < RANKS; j++) prefetch(a[j] + RANKS * in + k);
        step([&](const float* from) INLINE_LAMBDA { return load(from + k); });
    }
    if (k < in) step([&](const float* from) INLINE_LAMBDA { return load_some(from + k, in - k); });
    return sums(lanes);
}

template <int TOKENS>
void shrink(const LoraTask& task, const float* x, long stride, long in, long begin) {
    constexpr int RANKS = W / TOKENS;
    const LoraView& factors = *task.segment->factors;
    const float* rows[TOKENS];
    for (int i = 0; i < TOKENS; i++) rows[i] = x + token_of(*task.segment, begin + i) * stride;
    for (long rank = task.first; rank < task.last; rank += RANKS) {
        const float* others[RANKS];
        for (int j = 0; j < RANKS; j++) others[j] = factors.a + std::min(rank + j, task.last - 1) * in;
        float found[W];
        store(found, products<TOKENS>(rows, others, in));
        for (int i = 0; i < W; i++)
            if (const long at = rank + i % RANKS; at < task.last)
                task.shrunk[(begin + i / RANKS) * factors.rank + at] = found[i] * factors.scales[at];
    }
}

// Adds VECTORS * W outputs from n on to TOKENS tokens, or fewer of the last vector: `width` in all.
template <int TOKENS, int VECTORS>
INLINE void add_outputs(const LoraPart& part, const float* shrunk, long stride, float* const* y, long n, long width) {
    const long rest = width - (VECTORS - 1) * W;
    vf acc[TOKENS][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[i][v] = vf{};
    for (long rank = 0; rank < part.rank; rank++) {
        const float* from = part.b + rank * part.out_features + n;
        vf b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) prefetch(from + (2 * VECTORS + v) * W);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            b[v] = rest < W && v == VECTORS - 1 ? load_some(from + v * W, rest) : load(from + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[i][v] = fmadd(b[v], splat(shrunk[i * stride + rank]), acc[i][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; i++)
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

template <int TOKENS>
void expand(const LoraTask& task, float* y, long stride, long begin) {
    constexpr int VECTORS = W == 16 ? 4 : 2;
    const long width = task.segment->factors->rank;
    const float* shrunk = task.shrunk + begin * width + task.skipped;
    float* rows[TOKENS];
    for (int i = 0; i < TOKENS; i++) rows[i] = y + token_of(*task.segment, begin + i) * stride + task.part->column;
    long n = task.first;
    for (; n + VECTORS * W <= task.last; n += VECTORS * W)
        add_outputs<TOKENS, VECTORS>(*task.part, shrunk, width, rows, n, VECTORS * W);
    for (; n + W <= task.last; n += W) add_outputs<TOKENS, 1>(*task.part, shrunk, width, rows, n, W);
    if (n < task.last) add_outputs<TOKENS, 1>(*task.part, shrunk, width, rows, n, task.last - n);
}

// Calls four(first), two(first) or one(first) for the tokens of a task, that many at a time.
template <typename Four, typename Two, typename One>
INLINE void by_tokens(const LoraTask& task, Four&& four, Two&& two, One&& one) {
    long begin = task.begin;
    for (; begin + 4 <= task.end; begin += 4) four(begin);
    for (; begin + 2 <= task.end; begin += 2) two(begin);
    if (begin < task.end) one(begin);
}

// Appends tasks for all tokens of a segment, for numbers 0 to `size` of which a task has at most `most`.
void cut(std::vector<LoraTask>& tasks, const LoraTask& whole, long size, long most) {
    for (long begin = 0; begin < whole.segment->count; begin += MAX_TOKENS_PER_TASK)
        for (long first = 0; first < size; first += most) {
            tasks.push_back(whole);
            tasks.back().begin = begin;
            tasks.back().end = std::min(begin + MAX_TOKENS_PER_TASK, whole.segment->count);
            tasks.back().first = first;
            tasks.back().last = std::min(first + most, size);
        }
}

}  // namespace

void eft_lora_apply(const float* x, long x_stride, long in, float* y, long y_stride, const LoraTokens* segments,
                    long num_segments, int threads) {
    static thread_local Scratch scratch;
    long space = 0, numbers = 0;
    for (long i = 0; i < num_segments; i++) space += segments[i].count * segments[i].factors->rank;
    float* shrunk = scratch.floats(static_cast<size_t>(space));
    std::vector<LoraTask> shrinking, expanding;
    for (long i = 0; i < num_segments; i++) {
        const LoraView& factors = *segments[i].factors;
        LoraTask task{&segments[i], shrunk, 0, 0, 0, 0, nullptr, 0};
        cut(shrinking, task, factors.rank, MAX_RANKS_PER_TASK);
        for (long p = 0; p < factors.num_parts; p++) {
            task.part = &factors.parts[p];
            cut(expanding, task, task.part->out_features, MAX_OUTPUTS_PER_TASK);
            task.skipped += task.part->rank;
            numbers += task.part->rank * task.part->out_features * ((segments[i].count + 3) / 4);
        }
        shrunk += segments[i].count * factors.rank;
        numbers += factors.rank * in * ((segments[i].count + 3) / 4);
    }
    Phase shrinks(static_cast<long>(shrinking.size()));
    TaskQueue expands(static_cast<long>(expanding.size()));
    in_parallel(numbers < MIN_PARALLEL_NUMBERS ? 1 : threads, [&] {
        shrinks.run([&](long index) {
            const LoraTask& task = shrinking[static_cast<size_t>(index)];
            by_tokens(
                task, [&](long begin) { shrink<4>(task, x, x_stride, in, begin); },
                [&](long begin) { shrink<2>(task, x, x_stride, in, begin); },
                [&](long begin) { shrink<1>(task, x, x_stride, in, begin); });
        });
        long index;
        while (expands.claim(index)) {
            const LoraTask& task = expanding[static_cast<size_t>(index)];
            by_tokens(
                task, [&](long begin) { expand<4>(task, y, y_stride, begin); },
                [&](long begin) { expand<2>(task, y, y_stride, begin); },
                [&](long begin) { expand<1>(task, y, y_stride, begin); });
        }
    });
}
