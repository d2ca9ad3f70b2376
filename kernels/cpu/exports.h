// The boundary to Python: every function and struct that both sides use, declared once.
//
// `declarations.py` reads this file and makes the ctypes side from it, so it keeps to a small part of C++: `enum Name :
// int`, structs of data alone, one field a line, `using Name = void(...)` for a function type, and `EXPORT`
// declarations. The compiler checks that each definition agrees with its declaration, and that structs have the layout
// that ctypes gives them.
//
// Pointers may be null where the comment says so. Strides are in elements, from one row to the next. x, y, norms and
// biases are float32. `threads` is the number of threads to use at most, the caller's included.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Types of the KV cache, and of adapters' factors.
enum CacheType : int { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// A layer's linears, in the order in which they run.
enum LinearPlace : int { QKV = 0, OUT = 1, GATE_UP = 2, DOWN = 3 };

// Tiles of 64 outputs to which the same ranks of an adapter add.
struct LoraSpan {
    int64_t first_tile;
    int64_t end_tile;
    int64_t first_rank;
    int64_t ranks;
    int64_t offset;  // of the first tile in `b`, in numbers
};

// Factors of one adapter for one linear. Numbers that are integers are so times `scales`.
struct LoraView {
    const void* a;         // [rank, in]: every part's A, one below the other
    const void* b;         // by span, [tiles, ranks, 64]
    const float* scales;   // [rank]
    int64_t rank;          // of all parts together
    int64_t out_features;  // up to the last output that it changes
    const LoraSpan* spans;
    int64_t num_spans;
    int64_t type;  // `CacheType` of a and b
};

// Mask of an adapter's inputs in training: `kernels.training.dropout_mask`.
struct LoraDropout {
    int64_t seed;
    int64_t first_row;  // number of the first token's row of the mask
    int64_t threshold;  // hashes from here on stay
    float scale;        // of inputs that stay
};

// The tokens of a batch that one adapter applies to, for one linear.
struct LoraTokens {
    const int64_t* tokens;  // [count], or null: the first `count` of the batch
    int64_t count;
    const LoraView* factors;
    const LoraDropout* dropout;  // or null
};

// The tokens of a batch that have adapters, for one linear; no token is in two segments.
struct LoraBatch {
    const LoraTokens* segments;
    int64_t num_segments;
};

// y [rows, out] = f(norm(x) W^T + bias) + residual, for x [rows, in]. `values`, `scales` and `zero_sums` are the
// weight, as the comment of each function says. `norm` [in], `bias` [out] and `residual` [rows, out] may be null. With
// `swiglu` 1 the weight (and the bias) has 2 * out outputs, gates and then ups, and f(gate, up) is silu(gate) * up;
// else f(x) is x.
// `lora`, or null: what adapters add to x W^T before SwiGLU, else to y.
using LinearFunction = void(const float* x, long x_stride, long rows, long in, long out, const void* values,
                            const void* scales, const void* zero_sums, const float* bias, const float* norm, float eps,
                            const float* residual, float* y, int swiglu, const LoraBatch* lora,
                            int threads);

// A linear of a layer.
struct LinearView {
    LinearFunction* function;
    int64_t in_features;
    int64_t out_features;  // of the weight: with SwiGLU gates and ups
    const void* values;
    const void* scales;     // or null
    const void* zero_sums;  // or null
    const float* bias;      // or null
};

struct LayerView {
    LinearView linears[4];        // by `LinearPlace`
    const float* attention_norm;  // [hidden]
    const float* mlp_norm;        // [hidden]
    const float* q_norm;          // [head_dim], or null
    const float* k_norm;          // [head_dim], or null
    int64_t window;               // tokens that a token attends to; 0: all before it
    int64_t rope;                 // index of the table of angles; -1: queries and keys are not rotated
    int64_t fuses_swiglu;         // 1 if the linear of gate and up can be called with `swiglu`
};

// A layer's KV cache.
struct CacheView {
    char* keys;
    char* values;
};

// The tokens of a batch that one adapter applies to, for all layers.
struct AdapterTokens {
    const int64_t* tokens;  // [count], or null: the first `count` of the batch
    int64_t count;
    const LoraView* const* factors;  // [layers, 4], null where the adapter changes nothing
    const LoraDropout* dropout;      // [layers, 4], or null
};

// The last rows of a batch, which are of a sequence in training: what is kept of them, by layer. `to[layer]` has places
// for all `length` tokens of the sequence: [length, hidden] inputs of the layer, then queries, keys and values before
// rope, the residual stream after attention, gates and ups.
struct RidingView {
    int64_t count;  // rows of this batch
    int64_t start;  // place of the first in the sequence
    int64_t length;
    float* const* to;  // [layers]
};

// Sequences one after the other, as attention sees them. Heads of a token lie next to each other.
struct PackedSequences {
    const float* q;  // [tokens, heads, head_dim]
    int64_t q_stride;
    const float* k;  // [tokens, kv_heads, head_dim]
    int64_t k_stride;
    const float* v;
    int64_t v_stride;
    const int64_t* ends;  // [sequences]: the end of each in the batch
    int64_t sequences;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;  // a multiple of 16
    int64_t window;    // tokens that a token attends to; 0: all before it
    float scale;
};

// The tokens whose hidden state after the last layer is computed, where these are not all of the batch.
struct OutputTokens {
    const int64_t* tokens;  // [count], ascending
    int64_t count;
    const int64_t* tables;  // as for `eft_paged_attention`, each of these tokens as a row of its own
    const int64_t* extents;
    const AdapterTokens* adapters;  // `tokens` of these are indices into the output tokens
    int64_t num_adapters;
};

// ---- The library ----

// "eft-declarations:" and the digest of this file's declarations when the library was compiled (`declarations.py`).
EXPORT const char* eft_declarations();

// 1 if the system lets this process use the instructions that the library was compiled for, else 0. Asks Linux for AMX.
EXPORT int eft_permitted();

// ---- Linears (`LinearFunction`) ----

// values [out, in] float32, or bfloat16.
EXPORT LinearFunction eft_linear_float32;
EXPORT LinearFunction eft_linear_bfloat16;

// Tiles of 16 outputs, the rest of the last one zero; with `swiglu` out is a multiple of 16. Inputs are in groups of
// 32, a line of 64 bytes having four inputs of 16 outputs.
//
// int8: values [tiles, groups, 8, 64], rotated (`kernels/hadamard.py`), scales [tiles, 16] float32, zero_sums [tiles,
// 16] int32 from `eft_int8_zero_sums`. `narrow`: for weights of `quantise_narrow_int8` in `kernels/quantised.py`.
EXPORT LinearFunction eft_linear_int8;
EXPORT LinearFunction eft_linear_int8_narrow;

// int4: values [tiles, groups, 320], a group being 4 lines of two inputs a byte, 16 scales and 16 minimums in float16.
EXPORT LinearFunction eft_linear_int4;

// int8 in groups: values [tiles, groups, 544], a group being 8 lines of bytes from -127 to 127, and 16 scales in
// float16.
EXPORT LinearFunction eft_linear_int8_groups;

// nf4: values [tiles, blocks of 64 inputs, 8, 64], scales [tiles, blocks, 16] float32.
EXPORT LinearFunction eft_linear_nf4;

// ---- Quantised weights ----

// zero_sums [tiles, 16]: the integer sums that this instruction set gives for a row of zeros, which the linear
// subtracts from those of every row. values as for `eft_linear_int8`, or `eft_linear_int8_narrow` with `narrow` 1.
EXPORT void eft_int8_zero_sums(const int8_t* values, long tiles, long groups, int32_t* zero_sums, int narrow);

// y [count, in] = outputs `index` [count] of weights as for `eft_linear_int8`, rotated back.
EXPORT void eft_int8_rows(const int8_t* values, const float* scales, long in, const int64_t* index, long count,
                          float* y, int threads);

// y [out, width] = the outputs of weights as for `eft_linear_int8`, each integer times its scale, still rotated; width is
// the inputs rounded up to whole blocks of 64.
EXPORT void eft_int8_factor(const int8_t* values, const float* scales, long out, long width, float* y, int threads);

// y [rows, out] = the blocks of 64 of x [rows, in] times the Hadamard matrix (`kernels/hadamard.py`). x counts as zero
// after `in`; of the last block `out` may leave out the end.
EXPORT void eft_hadamard(const float* x, long stride, long rows, long in, float* y, long out, int threads);

// y [out, in] = weights as for `eft_linear_nf4`, each the product of a code's number and a scale.
EXPORT void eft_dequantise_nf4(const uint8_t* values, const float* scales, long out, long in, float* y, int threads);

// y [rows, out] int32 = x [rows, in] times values [out, in] transposed; sums [out] are those of each output's values.
EXPORT void eft_int8_matmul(const int8_t* x, long rows, long in, const int8_t* values, long stride,
                            const int32_t* sums, long out, int32_t* y, int threads);

// ---- Other ops of a layer ----

// y [tokens, out] += (scales * x A^T) B^T for the tokens of every segment; x [tokens, in].
EXPORT void eft_lora_apply(const float* x, long x_stride, long tokens, long in, float* y, long y_stride,
                           const LoraBatch* lora, int threads);

// y [rows, size] = x over its root mean square, times weight [size] plus `one`, which is 0 or 1.
EXPORT void eft_rms_norm(const float* x, long stride, long rows, long size, const float* weight, float one, float eps,
                         float* y, int threads);

// y [rows, size] = x less its mean, over its standard deviation, times weight, plus bias, each [size] or null.
EXPORT void eft_layer_norm(const float* x, long stride, long rows, long size, const float* weight, const float* bias,
                           float eps, float* y, int threads);

// y [rows, inner] = silu(gate) * up, or gelu(gate) * up; x [rows, 2 * inner], gate then up. `tanh` 1: the
// approximation.
EXPORT void eft_silu_mul(const float* x, long rows, long inner, float* y, int threads);
EXPORT void eft_gelu_mul(const float* x, long rows, long inner, int tanh, float* y, int threads);

// y [count] = gelu(x).
EXPORT void eft_gelu(const float* x, long count, int tanh, float* y, int threads);

// Rotates the first 2 * half dimensions of q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] in place by
// cos, sin [tokens, half], and writes k and v into the caches at slots [tokens].
EXPORT void eft_rope_and_cache(float* q, long q_stride, float* k, long k_stride, const float* v, long v_stride,
                               const float* cos, const float* sin, long half, char* keys, char* values,
                               const int64_t* slots, long tokens, long heads, long kv_heads, long head_dim,
                               int cache_type, int threads);

// Causal attention of q [tokens, heads, head_dim] over paged caches [blocks, block_size, kv_heads, bytes of a head], to
// out [tokens, heads, head_dim]. tables [rows, table_width]: block ids; extents [rows, 3]: first token in the batch,
// number of tokens, tokens before them in the cache. window 0: all tokens before; softcap 0: none.
EXPORT void eft_paged_attention(const float* q, long q_stride, const char* keys, const char* values,
                                const int64_t* tables, long table_width, const int64_t* extents, long rows, long heads,
                                long kv_heads, long head_dim, long block_size, float scale, long window, float softcap,
                                float* out, int cache_type, int threads);

// ---- Training ----

// Causal attention of packed sequences to out [tokens, heads, head_dim], and logsums [heads, tokens], the logarithms of
// the sums of e to the power of the scores.
EXPORT void eft_packed_attention(const PackedSequences* op, float* out, float* logsums, int threads);

// The gradients of q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] from `grad`, that of out.
EXPORT void eft_packed_attention_backward(const PackedSequences* op, const float* out, const float* logsums,
                                          const float* grad, float* grad_q, float* grad_k, float* grad_v, int threads);

// y [tokens, heads, head_dim] = x with the first 2 * half dimensions of each head turned by cos, sin [tokens, half];
// `back` 1: turned back.
EXPORT void eft_rope(const float* x, long stride, long tokens, long heads, long head_dim, const float* cos,
                     const float* sin, long half, int back, float* y, int threads);

// The gradients of the inputs of `eft_rms_norm` (y [rows, size], `one` 0) and `eft_silu_mul` (y [rows, 2 * inner]) from
// `grad`, that of the outputs.
EXPORT void eft_rms_norm_backward(const float* x, long stride, long rows, long size, const float* weight, float eps,
                                  const float* grad, float* y, int threads);
EXPORT void eft_silu_mul_backward(const float* x, long rows, long inner, const float* grad, float* y, int threads);

// ---- All of a step ----

// All layers: x [tokens, hidden] in place. cos, sin [tables of angles, tokens, half]; caches [num_layers]; the other
// arguments of attention as above. With `outputs`, or null, only these tokens go through the end of the last layer;
// they are the first rows of x then, and the others anything. `riding` may be null; its rows are among the outputs.
EXPORT void eft_layers(const LayerView* layers, long num_layers, long hidden, long inner, long heads, long kv_heads,
                       long head_dim, float eps, float scale, float softcap, const CacheView* caches, int cache_type,
                       float* x, long tokens, const float* cos, const float* sin, long half, const int64_t* slots,
                       const int64_t* tables, long table_width, const int64_t* extents, long rows, long block_size,
                       const AdapterTokens* adapters, long num_adapters, const OutputTokens* outputs,
                       const RidingView* riding, int threads);

// ---- From logits to tokens ----

// index [rows] = the first of each row's largest logits [rows, size], and its value; of a NaN, if there is one.
EXPORT void eft_argmax(const float* logits, long rows, long size, int64_t* index, float* value, int threads);

// A token of each row of logits [rows, size], where its distribution function passes uniform [rows]; see `Ops.sample`
// for the filters, each [rows].
EXPORT void eft_sample(const float* logits, long stride, long rows, long size, const double* uniform,
                       const float* temperature, const int64_t* top_k, const float* top_p, const float* min_p,
                       int64_t* tokens, int threads);
