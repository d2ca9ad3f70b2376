// All layers of a decoder as Llama has them, one after the other: the same ops as op by op, so the same bits, without a
// way through Python between any two of them.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "exports.h"
#include "row_transforms.h"
#include "scratch.h"
#include "threading.h"

namespace {

constexpr int NUM_PLACES = std::extent_v<decltype(LayerView::linears)>;
static_assert(DOWN + 1 == NUM_PLACES);

// Ops that are fused with a linear: a norm of its input, SwiGLU and a residual. See `LinearFunction`.
struct Epilogue {
    const float* norm = nullptr;
    float eps = 0.0f;
    const float* residual = nullptr;
    int swiglu = 0;
    const LoraBatch* lora = nullptr;
};

void multiply(const LinearView& w, const float* x, long rows, const Epilogue& fused, float* y, int threads) {
    const long out = fused.swiglu ? w.out_features / 2 : w.out_features;
    w.function(x, w.in_features, rows, w.in_features, out, w.values, w.scales, w.zero_sums, w.bias, fused.norm,
               fused.eps, fused.residual, y, fused.swiglu, fused.lora, threads);
}

// Bytes of memory at most that a thread keeps for its next call.
constexpr size_t MAX_KEPT_BYTES = 64 << 20;

// One pass through all layers.
struct LayersPass {
    const LayerView* layers;
    const CacheView* caches;
    const AdapterTokens* adapters;
    long num_adapters;
    long hidden, inner, heads, kv_heads, dim, tokens;
    float eps;
    const RidingView* riding;
    int threads;
    std::vector<LoraTokens> segments = {};
    LoraBatch lora = {};
    float *fused = nullptr, *attended = nullptr, *gates = nullptr, *mlp_inner = nullptr;

    long qkv_width() const { return (heads + 2 * kv_heads) * dim; }

    void allocate(Scratch& kept, Scratch& own) {
        const long sizes[] = {qkv_width(), heads * dim, 2 * inner, inner};
        long all = 0;
        for (long size : sizes) all += size;
        const auto bytes = static_cast<size_t>(tokens * all) * sizeof(float);
        float* memory = reinterpret_cast<float*>((bytes > MAX_KEPT_BYTES ? own : kept).bytes(bytes));
        float** places[] = {&fused, &attended, &gates, &mlp_inner};
        for (int i = 0; i < 4; i++) {
            *places[i] = memory;
            memory += tokens * sizes[i];
        }
    }

    // What adapters add to this linear, until the next call; null: none changes it.
    const LoraBatch* lora_of(long layer, LinearPlace place) {
        segments.clear();
        for (long i = 0; i < num_adapters; i++)
            if (const LoraView* factors = adapters[i].factors[layer * NUM_PLACES + place])
                segments.push_back({adapters[i].tokens, adapters[i].count, factors,
                                    adapters[i].dropout ? adapters[i].dropout + layer * NUM_PLACES + place : nullptr});
        lora = {segments.data(), static_cast<int64_t>(segments.size())};
        return segments.empty() ? nullptr : &lora;
    }

    // y = x's norm times the weight, and what adapters add.
    void norm_linear(long layer, LinearPlace place, const float* x, const float* norm, float* y) {
        multiply(layers[layer].linears[place], x, tokens, {norm, eps, nullptr, 0, lora_of(layer, place)}, y, threads);
    }

    // y += x times the weight, and what adapters add.
    void linear_add(long layer, LinearPlace place, const float* x, float* y) {
        multiply(layers[layer].linears[place], x, tokens, {nullptr, 0.0f, y, 0, lora_of(layer, place)}, y, threads);
    }

    // The MLP's inner values of x, into `mlp_inner`.
    void norm_swiglu(long layer, const float* x) {
        const LayerView& one = layers[layer];
        const LoraBatch* own = lora_of(layer, GATE_UP);
        if (one.fuses_swiglu && !riding)
            return multiply(one.linears[GATE_UP], x, tokens, {one.mlp_norm, eps, nullptr, 1, own}, mlp_inner, threads);
        norm_linear(layer, GATE_UP, x, one.mlp_norm, gates);
        if (riding) keep_rows(layer, 2 * hidden + qkv_width(), gates, 2 * inner);
        eft_silu_mul(gates, tokens, inner, mlp_inner, threads);
    }

    // Keeps [tokens, width] values of the riding rows, which are the last, at `offset` floats a token of the layer's.
    void keep_rows(long layer, long offset, const float* values, long width) const {
        std::copy_n(values + (tokens - riding->count) * width, riding->count * width,
                    riding->to[layer] + riding->length * offset + riding->start * width);
    }

    // Goes on with these tokens alone: moves rows of x and of queries to where the others were.
    void keep(const OutputTokens& outputs, float* x) {
        for (long i = 0; i < outputs.count; i++) {
            const long token = outputs.tokens[i];
            if (token == i) continue;
            std::copy_n(x + token * hidden, hidden, x + i * hidden);
            std::copy_n(fused + token * qkv_width(), heads * dim, fused + i * qkv_width());
        }
        tokens = outputs.count;
        adapters = outputs.adapters;
        num_adapters = outputs.num_adapters;
    }

    // Each head of queries or keys in place over its root mean square.
    void normalise_heads(float* x, long count, const float* norm) const {
        if (!norm) return;
        constexpr long TASK_TOKENS = 8;  // enough work to be worth its claim
        parallel_for(threads, (tokens + TASK_TOKENS - 1) / TASK_TOKENS, [&](long task) {
            for (long token = task * TASK_TOKENS; token < std::min(tokens, (task + 1) * TASK_TOKENS); token++)
                for (long head = 0; head < count; head++) {
                    float* at = x + token * qkv_width() + head * dim;
                    normalise(at, dim, norm, 0.0f, eps, at);
                }
        });
    }
};

}  // namespace

void eft_layers(const LayerView* layers, long num_layers, long hidden, long inner, long heads, long kv_heads,
                long head_dim, float eps, float scale, float softcap, const CacheView* caches, int cache_type, float* x,
                long tokens, const float* cos, const float* sin, long half, const int64_t* slots, const int64_t* tables,
                long table_width, const int64_t* extents, long rows, long block_size, const AdapterTokens* adapters,
                long num_adapters, const OutputTokens* outputs, const RidingView* riding, int threads) {
    static thread_local Scratch kept;
    std::optional<ShortSpinScope> short_spin(std::in_place);
    Scratch own;
    LayersPass pass{layers,   caches,   adapters, num_adapters, hidden, inner,  heads,
                    kv_heads, head_dim, tokens,   eps,          riding, threads};
    pass.allocate(kept, own);
    const long qkv_width = pass.qkv_width();
    float *q = pass.fused, *k = q + heads * head_dim, *v = k + kv_heads * head_dim;
    for (long i = 0; i < num_layers; i++) {
        const LayerView& layer = layers[i];
        const CacheView& cache = caches[i];
        if (riding) pass.keep_rows(i, 0, x, hidden);
        pass.norm_linear(i, QKV, x, layer.attention_norm, pass.fused);
        pass.normalise_heads(q, heads, layer.q_norm);
        pass.normalise_heads(k, kv_heads, layer.k_norm);
        if (riding) pass.keep_rows(i, hidden, pass.fused, qkv_width);
        const long angles = std::max<long>(layer.rope, 0) * tokens * half;
        eft_rope_and_cache(q, qkv_width, k, qkv_width, v, qkv_width, cos + angles, sin + angles,
                           layer.rope < 0 ? 0 : half, cache.keys, cache.values, slots, tokens, heads, kv_heads,
                           head_dim, cache_type, threads);
        if (outputs && i + 1 == num_layers) {
            // Keys and values are all that later tokens see of the others.
            if (outputs->count == 0) return;
            pass.keep(*outputs, x);
            tables = outputs->tables;
            extents = outputs->extents;
            rows = outputs->count;
        }
        eft_paged_attention(q, qkv_width, cache.keys, cache.values, tables, table_width, extents, rows, heads, kv_heads,
                            head_dim, block_size, scale, layer.window, softcap, pass.attended, cache_type, threads);
        pass.linear_add(i, OUT, pass.attended, x);
        if (riding) pass.keep_rows(i, hidden + qkv_width, x, hidden);
        pass.norm_swiglu(i, x);
        if (i + 1 == num_layers) short_spin.reset();  // what comes after this one comes from Python
        pass.linear_add(i, DOWN, pass.mlp_inner, x);
    }
}
