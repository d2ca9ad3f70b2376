#include "lora_rows.h"

#include "bfloat16.h"
#include "row_transforms.h"

namespace {

// Size of a task at most: tokens, and ranks of shrunk values or tiles of outputs.
constexpr long MAX_TOKENS_PER_TASK = 16;
constexpr long MAX_RANKS_PER_TASK = 32;
constexpr long MAX_TILES_PER_TASK = 8;
// Numbers to be read below which waking the other threads takes longer than the work.
constexpr long MIN_PARALLEL_NUMBERS = 32768;

// Index into the batch of a segment's token.
INLINE long token_of(const LoraTokens& segment, long i) { return segment.tokens ? segment.tokens[i] : i; }

// Calls take(number) with a number of the adapter's type.
template <typename Take>
INLINE void by_type(const LoraView& factors, Take&& take) {
    switch (factors.type) {
        case FLOAT32: return take(float{});
        case BFLOAT16: return take(uint16_t{});
        case INT8: return take(int8_t{});
    }
}

template <typename T>
INLINE vf load_some(const T* from, long count) {
    T some[W] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
    return load_weights(some);
}

// A number, mixed: different ones stay different. As `kernels.training` has it.
INLINE uint32_t hashed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    return (x ^ (x >> 15)) * 0x846CA68Bu;
}

// to = x with the mask of a token. May be x itself.
void drop(const LoraDropout& dropout, long token, const float* x, long in, float* to) {
    const auto seed = static_cast<uint64_t>(dropout.seed);
    const auto row = static_cast<uint32_t>(dropout.first_row + token) + static_cast<uint32_t>(seed);
    const uint32_t key = hashed(hashed(row) + static_cast<uint32_t>(seed >> 32));
    const auto threshold = static_cast<int32_t>(dropout.threshold);
    for (long i = 0; i < in; i++) {
        const auto hash = static_cast<int32_t>(hashed(static_cast<uint32_t>(i) * 0x9E3779B1u + key));
        to[i] = hash >= threshold ? x[i] * dropout.scale : 0.0f;
    }
}

// The products of TOKENS rows of x with W / TOKENS rows of a, one a lane.
template <int TOKENS, typename T>
INLINE vf products(const float* const* x, const T* const* a, long in) {
    constexpr int RANKS = W / TOKENS;
    constexpr long LINE = 64 / static_cast<long>(sizeof(T));
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
        if (k % LINE == 0)
#pragma GCC unroll 16
            for (int j = 0; j < RANKS; j++) prefetch(a[j] + RANKS * in + k);
        step([&](const auto* from) INLINE_LAMBDA { return load_weights(from + k); });
    }
    if (k < in) step([&](const auto* from) INLINE_LAMBDA { return load_some(from + k, in - k); });
    return sums(lanes);
}

// The shrunk values of TOKENS rows, for ranks `first` to `last`, to to[i * rank + r].
template <int TOKENS, typename T>
void shrink_rows(const LoraView& factors, const float* const* rows, long in, long first, long last, float* to) {
    constexpr int RANKS = W / TOKENS;
    const T* a = static_cast<const T*>(factors.a);
    for (long rank = first; rank < last; rank += RANKS) {
        const T* others[RANKS];
        for (int j = 0; j < RANKS; j++) others[j] = a + std::min(rank + j, last - 1) * in;
        float found[W];
        store(found, products<TOKENS>(rows, others, in));
        for (int i = 0; i < W; i++)
            if (const long at = rank + i % RANKS; at < last)
                to[i / RANKS * factors.rank + at] = found[i] * factors.scales[at];
    }
}

// Vectors of a tile, and of them those whose sums are in registers together; tokens that share what is loaded.
constexpr int TILE_VECTORS = LORA_TILE / W;
constexpr int VECTORS_AT_ONCE = 4;
constexpr int TOKENS_AT_ONCE = W == 16 ? 4 : 2;

// Writes a tile's outputs for TOKENS tokens, from `ranks` ranks of b.
template <int TOKENS, typename T>
INLINE void expand_tile(const T* b, long ranks, const float* shrunk, long rank, float* to, long width) {
    constexpr long BYTES = LORA_TILE * static_cast<long>(sizeof(T));
#pragma GCC unroll 1
    for (int from = 0; from < TILE_VECTORS; from += VECTORS_AT_ONCE) {
        vf acc[TOKENS][VECTORS_AT_ONCE];
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS_AT_ONCE; v++) acc[i][v] = vf{};
        for (long r = 0; r < ranks; r++) {
            const T* row = b + r * LORA_TILE;
            if (from == 0)
#pragma GCC unroll 4
                for (long line = 0; line < BYTES; line += 64)
                    prefetch(reinterpret_cast<const char*>(row) + ranks * BYTES + line);
            vf w[VECTORS_AT_ONCE];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS_AT_ONCE; v++) w[v] = load_weights(row + (from + v) * W);
#pragma GCC unroll 4
            for (int i = 0; i < TOKENS; i++) {
                const vf x = splat(shrunk[i * rank + r]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS_AT_ONCE; v++) acc[i][v] = fmadd(w[v], x, acc[i][v]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS_AT_ONCE; v++) store(to + i * width + (from + v) * W, acc[i][v]);
    }
}

// The outputs of a tile to which an adapter adds, or null.
INLINE const LoraSpan* span_of(const LoraView& factors, long tile) {
    for (long i = 0; i < factors.num_spans; i++)
        if (const LoraSpan& span = factors.spans[i]; span.first_tile <= tile && tile < span.end_tile) return &span;
    return nullptr;
}

// Writes outputs of `count` tokens from shrunk [count][rank] to deltas [count][width], for tiles `first` to `last`.
template <typename T>
void expand_tiles(const LoraView& factors, const float* shrunk, float* deltas, long width, long count, long first,
                  long last) {
    for (long tile = first; tile < last; tile++) {
        float* to = deltas + tile * LORA_TILE;
        const LoraSpan* span = span_of(factors, tile);
        if (span == nullptr) {
            for (long i = 0; i < count; i++) std::fill_n(to + i * width, LORA_TILE, 0.0f);
            continue;
        }
        const T* b = static_cast<const T*>(factors.b) + span->offset +
                     (tile - span->first_tile) * span->ranks * LORA_TILE;
        const auto some = [&](auto tokens, long i) INLINE_LAMBDA {
            expand_tile<decltype(tokens)::value>(b, span->ranks, shrunk + i * factors.rank + span->first_rank,
                                                 factors.rank, to + i * width, width);
        };
        long i = 0;
        for (; i + TOKENS_AT_ONCE <= count; i += TOKENS_AT_ONCE)
            some(std::integral_constant<int, TOKENS_AT_ONCE>{}, i);
        if (TOKENS_AT_ONCE > 2)
            for (; i + 2 <= count; i += 2) some(std::integral_constant<int, 2>{}, i);
        if (i < count) some(std::integral_constant<int, 1>{}, i);
    }
}

}  // namespace

LoraDeltas::Plan& LoraDeltas::plan_of_thread() {
    static thread_local Plan plan;
    return plan;
}

const float* const* LoraDeltas::make_plan(const LoraBatch* lora, const LoraInputs& inputs) {
    Plan& plan = plan_of_thread();
    plan.shrinks.clear();
    plan.expands.clear();
    if (lora == nullptr) return nullptr;
    const size_t table = (static_cast<size_t>(inputs.rows) * sizeof(float*) + 63) / 64 * 64;
    const long width = inputs.width();
    size_t space = 0;
    for (long i = 0; i < lora->num_segments; i++)
        space += static_cast<size_t>(lora->segments[i].count * (width + lora->segments[i].factors->rank));
    char* memory = plan.memory.bytes(table + space * sizeof(float));
    float** rows = reinterpret_cast<float**>(memory);
    float* next = reinterpret_cast<float*>(memory + table);
    std::fill_n(rows, inputs.rows, nullptr);
    for (long i = 0; i < lora->num_segments; i++) {
        const LoraTokens& segment = lora->segments[i];
        const long count = segment.count, rank = segment.factors->rank;
        float *deltas = next, *shrunk = next + count * width;
        next = shrunk + count * rank;
        for (long t = 0; t < count; t++) rows[token_of(segment, t)] = deltas + t * width;
        const auto cut = [&](std::vector<Task>& tasks, long begin, long size, long most) {
            for (long first = 0; first < size; first += most)
                tasks.push_back({&segment, shrunk, deltas, begin, std::min(begin + MAX_TOKENS_PER_TASK, count), first,
                                 std::min(first + most, size)});
        };
        for (long begin = 0; begin < count; begin += MAX_TOKENS_PER_TASK) {
            cut(plan.shrinks, begin, rank, MAX_RANKS_PER_TASK);
            cut(plan.expands, begin, width / LORA_TILE, MAX_TILES_PER_TASK);
        }
    }
    return rows;
}

LoraDeltas::LoraDeltas(const LoraBatch* lora, const LoraInputs& inputs)
    : inputs_(inputs),
      rows_(make_plan(lora, inputs)),
      plan_(plan_of_thread()),
      shrinks_(static_cast<long>(plan_.shrinks.size())),
      expands_(static_cast<long>(plan_.expands.size())) {}

template <typename T>
void LoraDeltas::shrink(const Task& task) const {
    static thread_local Scratch scratch;
    const LoraView& factors = *task.segment->factors;
    const long in = inputs_.in, count = task.end - task.begin;
    const float* rows[MAX_TOKENS_PER_TASK];
    const LoraDropout* dropout = task.segment->dropout;
    float* own = inputs_.norm || dropout ? scratch.floats(static_cast<size_t>(count * in)) : nullptr;
    for (long i = 0; i < count; i++) {
        rows[i] = inputs_.x + token_of(*task.segment, task.begin + i) * inputs_.stride;
        if (own == nullptr) continue;
        float* to = own + i * in;
        if (inputs_.norm) normalise(rows[i], in, inputs_.norm, 0.0f, inputs_.eps, to);
        if (dropout) drop(*dropout, task.begin + i, inputs_.norm ? to : rows[i], in, to);
        rows[i] = to;
    }
    float* to = task.shrunk + task.begin * factors.rank;
    const auto some = [&](auto tokens, long i) INLINE_LAMBDA {
        shrink_rows<decltype(tokens)::value, T>(factors, rows + i, in, task.first, task.last, to + i * factors.rank);
    };
    long i = 0;
    for (; i + 4 <= count; i += 4) some(std::integral_constant<int, 4>{}, i);
    for (; i + 2 <= count; i += 2) some(std::integral_constant<int, 2>{}, i);
    if (i < count) some(std::integral_constant<int, 1>{}, i);
}

void LoraDeltas::shrink() {
    shrinks_.work([&](long index) {
        const Task& task = plan_.shrinks[static_cast<size_t>(index)];
        by_type(*task.segment->factors, [&](auto number) { shrink<decltype(number)>(task); });
    });
}

void LoraDeltas::expand() {
    shrinks_.wait();
    expands_.work([&](long index) {
        const Task& task = plan_.expands[static_cast<size_t>(index)];
        const LoraView& factors = *task.segment->factors;
        const long width = inputs_.width();
        by_type(factors, [&](auto number) {
            expand_tiles<decltype(number)>(factors, task.shrunk + task.begin * factors.rank,
                                           task.deltas + task.begin * width, width, task.end - task.begin, task.first,
                                           task.last);
        });
    });
}

void eft_lora_apply(const float* x, long x_stride, long tokens, long in, float* y, long y_stride,
                    const LoraBatch* lora, int threads) {
    long numbers = 0, out = 0;
    for (long i = 0; i < lora->num_segments; i++) {
        const LoraView& factors = *lora->segments[i].factors;
        numbers += factors.rank * (in + factors.out_features) * ((lora->segments[i].count + 3) / 4);
        out = std::max<long>(out, factors.out_features);
    }
    LoraDeltas deltas(lora, {x, x_stride, tokens, in, out, nullptr, 0.0f});
    TaskQueue adds((tokens + MAX_TOKENS_PER_TASK - 1) / MAX_TOKENS_PER_TASK);
    std::vector<long> widths(static_cast<size_t>(tokens));
    for (long i = 0; i < lora->num_segments; i++) {
        const LoraTokens& segment = lora->segments[i];
        for (long t = 0; t < segment.count; t++)
            widths[static_cast<size_t>(token_of(segment, t))] = segment.factors->out_features;
    }
    in_parallel(numbers < MIN_PARALLEL_NUMBERS ? 1 : threads, [&] {
        deltas.shrink();
        deltas.expand();
        deltas.wait();
        long task;
        while (adds.claim(task))
            for (long t = task * MAX_TOKENS_PER_TASK; t < std::min(tokens, (task + 1) * MAX_TOKENS_PER_TASK); t++) {
                float* to = y + t * y_stride;
                const float* delta = deltas.rows()[t];
                for (long n = 0; n < widths[static_cast<size_t>(t)]; n++) to[n] += delta[n];
            }
    });
}
