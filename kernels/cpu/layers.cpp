// All layers of a decoder as Llama has them, one after the other: the same ops as op by op, so the same bits, without a
// way through Python between any two of them.
#include <algorithm>
#include <optional>
#include <vector>

#include "call_linear.h"
#include "exports.h"
#include "lora.h"
#include "norm.h"
#include "parallel.h"
#include "scratch.h"

namespace {

// As `kernels/cpu/layers.py` writes them.
struct Weight {
    void* op;  // one of the linears
    int64_t in, out;
    int64_t count;  // of its tensors
    const void* tensors[3];
    const float* bias;  // or null
};

enum Place { QKV, OUT, GATE_UP, DOWN, PLACES };

struct Layer {
    Weight linears[PLACES];
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *q_norm, *k_norm;            // [dim], or null
    int64_t window;                          // or 0
    int64_t rope;                            // which of the tables of angles; -1: none
    int64_t fuses;                           // whether the op of gate and up takes `swiglu`
};

struct Cache {
    char *keys, *values;
};

// An adapter, and the tokens of the batch that it is for.
struct Adapter {
    const int64_t* tokens;  // or null: all of them
    int64_t count;
    const Factors* const* factors;  // [layers][PLACES], or null where it changes nothing
};

// The tokens after whose last layer something is done, where these are not all of the batch.
struct Wanted {
    const int64_t* tokens;  // ascending
    int64_t count;
    const int64_t *tables, *extents;  // of attention, each token as a row of its own
    const Adapter* adapters;          // of these tokens, by their number among them
    int64_t adapted;
};

void multiply(const Weight& w, const float* x, long rows, const Around& around, float* y, int threads) {
    const long out = around.swiglu ? w.out / 2 : w.out;
    call_linear(w.op, x, rows, w.in, out, w.tensors, w.count, w.bias, around, y, threads);
}

constexpr size_t KEPT = 64 << 20;
// Bytes of memory that stay for the next call.

// One pass through all layers.
struct Pass {
    const Layer* layers;
    const Cache* caches;
    const Adapter* adapters;
    long adapted;
    long hidden, inner, heads, kv_heads, dim, tokens;
    float eps;
    int threads;
    std::vector<Segment> segments = {};
    float *fused = nullptr, *mixed = nullptr, *gates = nullptr, *between = nullptr, *normed = nullptr;

    long wide() const { return (heads + 2 * kv_heads) * dim; }

    void lay_out(Scratch& kept, Scratch& own) {
        const long sizes[] = {wide(), heads * dim, 2 * inner, inner, hidden};
        long all = 0;
        for (long size : sizes) all += size;
        const auto bytes = static_cast<size_t>(tokens * all) * sizeof(float);
        float* memory = reinterpret_cast<float*>((bytes > KEPT ? own : kept).bytes(bytes));
        float** places[] = {&fused, &mixed, &gates, &between, &normed};
        for (int i = 0; i < 5; i++) {
            *places[i] = memory;
            memory += tokens * sizes[i];
        }
    }

    // Whether an adapter changes this linear; if so, `segments` are those that do.
    bool adapts(long layer, Place place) {
        segments.clear();
        for (long i = 0; i < adapted; i++)
            if (const Factors* factors = adapters[i].factors[layer * PLACES + place])
                segments.push_back({adapters[i].tokens, adapters[i].count, factors});
        return !segments.empty();
    }

    // y += what adapters make of x.
    void adapt(const Weight& w, const float* x, float* y) const {
        eft_lora_apply(x, w.in, w.in, y, w.out, segments.data(), static_cast<long>(segments.size()), threads);
    }

    // y = x's norm times the weight, and what adapters add.
    void project(long layer, Place place, const float* x, const float* norm, float* y) {
        const Weight& w = layers[layer].linears[place];
        if (!adapts(layer, place)) return multiply(w, x, tokens, {norm, eps}, y, threads);
        eft_rms_norm(x, hidden, tokens, hidden, norm, 0.0f, eps, normed, threads);
        multiply(w, normed, tokens, {}, y, threads);
        adapt(w, normed, y);
    }

    // y += x times the weight, and what adapters add.
    void add(long layer, Place place, const float* x, float* y) {
        const Weight& w = layers[layer].linears[place];
        multiply(w, x, tokens, {nullptr, 0.0f, y}, y, threads);
        if (adapts(layer, place)) adapt(w, x, y);
    }

    // The MLP's inner values of x, into `between`.
    void expand(long layer, const float* x) {
        const Layer& one = layers[layer];
        if (one.fuses && !adapts(layer, GATE_UP))
            return multiply(one.linears[GATE_UP], x, tokens, {one.mlp_norm, eps, nullptr, 1}, between, threads);
        project(layer, GATE_UP, x, one.mlp_norm, gates);
        eft_silu_mul(gates, tokens, inner, between, threads);
    }

    // Goes on with these tokens alone: moves rows of x and of queries to where the others were.
    void keep(const Wanted& wanted, float* x) {
        for (long i = 0; i < wanted.count; i++) {
            const long token = wanted.tokens[i];
            if (token == i) continue;
            std::copy_n(x + token * hidden, hidden, x + i * hidden);
            std::copy_n(fused + token * wide(), heads * dim, fused + i * wide());
        }
        tokens = wanted.count;
        adapters = wanted.adapters;
        adapted = wanted.adapted;
    }

    // Each head of queries or keys in place over its root mean square.
    void normalise_heads(float* x, long count, const float* norm) const {
        if (!norm) return;
        constexpr long SHARE = 8;
        for_each(threads, (tokens + SHARE - 1) / SHARE, [&](long task) {
            for (long token = task * SHARE; token < std::min(tokens, (task + 1) * SHARE); token++)
                for (long head = 0; head < count; head++) {
                    float* at = x + token * wide() + head * dim;
                    normalise(at, dim, norm, 0.0f, eps, at);
                }
        });
    }
};

}  // namespace

// x [tokens, hidden], changed in place. cos, sin [tables, tokens, half]; the arguments of attention are those of
// `eft_paged_attention`, caches [layers], of their type; adapters [adapted]; `wanted`: a `Wanted`, whose tokens are then
// the first rows of x and the others anything, or null.
EXPORT void eft_layers(const void* table, long layers, long hidden, long inner, long heads, long kv_heads, long dim,
                       float eps, float scale, float softcap, const void* caches, int type, float* x, long tokens,
                       const float* cos, const float* sin, long half, const int64_t* slots, const int64_t* tables,
                       long width, const int64_t* extents, long rows, long block_size, const void* adapters,
                       long adapted, const void* wanted, int threads) {
    static thread_local Scratch kept;
    std::optional<OpsInARow> in_a_row(std::in_place);
    Scratch own;
    Pass pass{static_cast<const Layer*>(table),
              static_cast<const Cache*>(caches),
              static_cast<const Adapter*>(adapters),
              adapted, hidden, inner, heads, kv_heads, dim, tokens, eps, threads};
    pass.lay_out(kept, own);
    const long wide = pass.wide();
    float *q = pass.fused, *k = q + heads * dim, *v = k + kv_heads * dim;
    for (long i = 0; i < layers; i++) {
        const Layer& layer = pass.layers[i];
        const Cache& cache = pass.caches[i];
        pass.project(i, QKV, x, layer.attention_norm, pass.fused);
        pass.normalise_heads(q, heads, layer.q_norm);
        pass.normalise_heads(k, kv_heads, layer.k_norm);
        const long angles = std::max<long>(layer.rope, 0) * tokens * half;
        eft_rope_and_cache(q, wide, k, wide, v, wide, cos + angles, sin + angles, layer.rope < 0 ? 0 : half, cache.keys,
                           cache.values, slots, tokens, heads, kv_heads, dim, type, threads);
        if (const auto* some = static_cast<const Wanted*>(wanted); some && i + 1 == layers) {
            // Keys and values are all that later tokens see of the others.
            if (some->count == 0) return;
            pass.keep(*some, x);
            tables = some->tables;
            extents = some->extents;
            rows = some->count;
        }
        eft_paged_attention(q, wide, cache.keys, cache.values, tables, width, extents, rows, heads, kv_heads, dim,
                            block_size, scale, layer.window, softcap, pass.mixed, type, threads);
        pass.add(i, OUT, pass.mixed, x);
        pass.expand(i, x);
        if (i + 1 == layers) in_a_row.reset();  // what comes after this one comes from Python
        pass.add(i, DOWN, pass.between, x);
    }
}
