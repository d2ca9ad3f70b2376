// Causal attention of packed sequences without a cache, and its gradients: what training needs, in float32.
//
// Scores are computed by blocks of queries and keys, and again in the backward pass, which keeps nothing but the
// logarithm of each query's sum (FlashAttention-2, arXiv:2307.08691). All products are of one kind: rows times a matrix
// whose rows lie along vectors, so keys and values are transposed block by block first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exports.h"
#include "scratch.h"
#include "simd.h"
#include "threading.h"

namespace {

// Tokens of a block of queries, and of one of keys.
constexpr long BLOCK = 64;

// Size of a tile of a product: as many sums as the registers hold beside a row of the right matrix.
constexpr int TILE_ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

// A matrix of which element (i, j) lies at data[i * row + j * column].
struct LeftMatrix {
    const float* data;
    long row, column;
};

// A matrix whose rows lie in one piece, `row` floats apart.
struct RightMatrix {
    const float* data;
    long row;
};

struct ProductOutput {
    float* data;
    long row;
    bool adds;
};

template <int R, int N>
INLINE void multiply_tile(const LeftMatrix& a, const RightMatrix& b, long depth, const ProductOutput& y) {
    vf acc[R][N];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[r][n] = y.adds ? load(y.data + r * y.row + n * W) : vf{};
    const float *left = a.data, *right = b.data;
    for (long k = 0; k < depth; k++, left += a.column, right += b.row) {
        vf columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) columns[n] = load(right + n * W);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf one = splat(left[r * a.row]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) acc[r][n] = fmadd(one, columns[n], acc[r][n]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(y.data + r * y.row + n * W, acc[r][n]);
}

template <int R, int N>
void multiply_strip(LeftMatrix a, const RightMatrix& b, long rows, long depth, ProductOutput y) {
    for (; rows >= R; rows -= R) {
        multiply_tile<R, N>(a, b, depth, y);
        a.data += R * a.row;
        y.data += R * y.row;
    }
    if constexpr (R > 1) {
        if (rows > 0) multiply_strip<R / 2, N>(a, b, rows, depth, y);
    }
}

// y [rows, columns] = or += a [rows, depth] b [depth, columns]; columns are a multiple of W.
void multiply(const LeftMatrix& a, RightMatrix b, long rows, long depth, long columns, ProductOutput y) {
    for (; columns >= TILE_VECTORS * W; columns -= TILE_VECTORS * W) {
        multiply_strip<TILE_ROWS, TILE_VECTORS>(a, b, rows, depth, y);
        b.data += TILE_VECTORS * W;
        y.data += TILE_VECTORS * W;
    }
    for (; columns > 0; columns -= W) {
        multiply_strip<TILE_ROWS, 1>(a, b, rows, depth, y);
        b.data += W;
        y.data += W;
    }
}

// to [dim][BLOCK] = the first `count` tokens of x transposed, and zeros.
void transpose_block(const float* x, long stride, long count, long dim, float* to) {
    for (long token = 0; token < BLOCK; token += W)
        for (long d = 0; d < dim; d += W) {
            vf rows[W];
            for (int i = 0; i < W; i++) rows[i] = token + i < count ? load(x + (token + i) * stride + d) : vf{};
            transpose(rows);
            for (int i = 0; i < W; i++) store(to + (d + i) * BLOCK + token, rows[i]);
        }
}

// A block of one sequence's tokens.
struct TokenBlock {
    long sequence, index;
    long begin;   // the sequence's first token in the batch
    long length;  // of the sequence

    long place() const { return index * BLOCK; }
    long token() const { return begin + place(); }
    long count() const { return std::min(BLOCK, length - place()); }
};

class PackedBatch {
 public:
    explicit PackedBatch(const PackedSequences& op) : op_(op) {
        long begin = 0;
        for (long sequence = 0; sequence < op.sequences; sequence++) {
            const long length = op.ends[sequence] - begin;
            firsts_.push_back(static_cast<long>(blocks_.size()));
            for (long index = 0; index * BLOCK < length; index++) blocks_.push_back({sequence, index, begin, length});
            begin = op.ends[sequence];
        }
        firsts_.push_back(static_cast<long>(blocks_.size()));
        tokens_ = begin;
    }

    const std::vector<TokenBlock>& blocks() const { return blocks_; }
    long tokens() const { return tokens_; }
    long group() const { return op_.heads / op_.kv_heads; }
    long transposed_size() const { return static_cast<long>(blocks_.size()) * op_.kv_heads * op_.head_dim * BLOCK; }

    // The blocks of a sequence, as numbers of `blocks`.
    long first_block(long sequence) const { return firsts_[static_cast<size_t>(sequence)]; }
    long end_block(long sequence) const { return firsts_[static_cast<size_t>(sequence) + 1]; }

    // The first place in the sequence that the token at `place` attends to.
    long first_visible(long place) const { return op_.window > 0 ? std::max(0L, place - op_.window + 1) : 0; }

    // [dim][BLOCK] of a block's keys or values, in what `transpose_all` made.
    RightMatrix transposed(const float* all, long block, long kv_head) const {
        return {all + (block * op_.kv_heads + kv_head) * op_.head_dim * BLOCK, BLOCK};
    }

    // All keys to `keys`, and with `values` all values to there.
    void transpose_all(float* keys, float* values, int threads) const {
        const long both = values ? 2 : 1, heads = op_.kv_heads;
        parallel_for(threads, static_cast<long>(blocks_.size()) * heads * both, [&](long task) {
            const long block = task / both / heads, head = task / both % heads;
            const TokenBlock& one = blocks_[static_cast<size_t>(block)];
            const bool is_key = task % both == 0;
            const float* from = is_key ? op_.k + one.token() * op_.k_stride : op_.v + one.token() * op_.v_stride;
            float* to = (is_key ? keys : values) + (block * heads + head) * op_.head_dim * BLOCK;
            transpose_block(from + head * op_.head_dim, is_key ? op_.k_stride : op_.v_stride, one.count(), op_.head_dim,
                            to);
        });
    }

 private:
    const PackedSequences& op_;
    std::vector<TokenBlock> blocks_;
    std::vector<long> firsts_;
    long tokens_ = 0;
};

// Scores [width], of which those from `first` to `end` count, become weights that add up to 1. Returns the logarithm of
// the sum of e to the power of scores times `scale`.
float softmax(float* scores, long width, long first, long end, float scale) {
    std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
    std::fill(scores + end, scores + width, -std::numeric_limits<float>::infinity());
    vf most = load(scores);
    for (long i = W; i < width; i += W) most = max(load(scores + i), most);
    const float highest = maximum(most) * scale;
    vf sums = {};
    for (long i = 0; i < width; i += W) {
        const vf weight = exp(load(scores + i) * splat(scale) - splat(highest));
        sums += weight;
        store(scores + i, weight);
    }
    const float total = sum(sums);
    for (long i = 0; i < width; i += W) store(scores + i, load(scores + i) * splat(1.0f / total));
    return highest + std::log(total);
}

// One head's queries of one block.
void attend_block(const PackedSequences& op, const PackedBatch& batch, const float* keys, long number, long head,
                  float* out, float* logsums) {
    static thread_local Scratch scratch;
    const TokenBlock& block = batch.blocks()[static_cast<size_t>(number)];
    const long rows = block.count(), dim = op.head_dim, kv_head = head / batch.group();
    const long from = batch.first_visible(block.place()) / BLOCK, width = (block.index + 1 - from) * BLOCK;
    float* scores = scratch.floats(static_cast<size_t>(rows * width));
    const LeftMatrix queries{op.q + block.token() * op.q_stride + head * dim, op.q_stride, 1};
    for (long other = from; other <= block.index; other++)
        multiply(queries, batch.transposed(keys, batch.first_block(block.sequence) + other, kv_head), rows, dim, BLOCK,
                 {scores + (other - from) * BLOCK, width, false});
    for (long row = 0; row < rows; row++) {
        const long place = block.place() + row, start = from * BLOCK;
        logsums[head * batch.tokens() + block.begin + place] =
            softmax(scores + row * width, width, batch.first_visible(place) - start, place + 1 - start, op.scale);
    }
    const RightMatrix values{op.v + (block.begin + from * BLOCK) * op.v_stride + kv_head * dim, op.v_stride};
    multiply({scores, width, 1}, values, rows, block.place() + rows - from * BLOCK, dim,
             {out + (block.token() * op.heads + head) * dim, op.heads * dim, false});
}

// What the backward pass reads, and the gradients of one head's keys and values [tokens, dim].
struct HeadGradients {
    const float *keys, *values;  // transposed
    const float *out, *logsums, *grad;
    float *grad_q, *grad_k, *grad_v;
};

// A block's weights [rows, BLOCK] from its scores, and the gradient of the scores from that of the weights; zero where a
// query does not see a key. `other` is the block of keys.
void softmax_backward(const PackedSequences& op, const PackedBatch& batch, const TokenBlock& block, long other,
                      const float* logsums, const float* deltas, float* weights, float* grads) {
    for (long row = 0; row < block.count(); row++) {
        const long place = block.place() + row, start = other * BLOCK;
        const long first = std::clamp(batch.first_visible(place) - start, 0L, BLOCK);
        const long end = std::clamp(place + 1 - start, 0L, BLOCK);
        float *weight = weights + row * BLOCK, *grad = grads + row * BLOCK;
        const vf logsum = splat(logsums[row]), delta = splat(deltas[row]), scale = splat(op.scale);
        for (long i = 0; i < BLOCK; i += W) {
            const vf one = exp(load(weight + i) * scale - logsum);
            store(weight + i, one);
            store(grad + i, one * (load(grad + i) - delta) * scale);
        }
        for (float* values : {weight, grad}) {
            std::fill(values, values + first, 0.0f);
            std::fill(values + std::max(first, end), values + BLOCK, 0.0f);
        }
    }
}

// One head of one sequence.
void attend_backward(const PackedSequences& op, const PackedBatch& batch, long sequence, long head,
                     const HeadGradients& to) {
    static thread_local Scratch scratch;
    float* weights = scratch.floats(static_cast<size_t>(2 * BLOCK * BLOCK));
    float* grads = weights + BLOCK * BLOCK;
    const long dim = op.head_dim, wide = op.heads * dim, kv_head = head / batch.group();
    const long first_block = batch.first_block(sequence);
    for (long number = first_block; number < batch.end_block(sequence); number++) {
        const TokenBlock& block = batch.blocks()[static_cast<size_t>(number)];
        const long rows = block.count(), at = block.token() * wide + head * dim;
        const float* queries = op.q + block.token() * op.q_stride + head * dim;
        float deltas[BLOCK];
        for (long row = 0; row < rows; row++) {
            vf products = {};
            for (long d = at + row * wide; d < at + row * wide + dim; d += W)
                products = fmadd(load(to.out + d), load(to.grad + d), products);
            deltas[row] = sum(products);
        }
        const long from = batch.first_visible(block.place()) / BLOCK;
        for (long other = from; other <= block.index; other++) {
            const TokenBlock& seen = batch.blocks()[static_cast<size_t>(first_block + other)];
            multiply({queries, op.q_stride, 1}, batch.transposed(to.keys, first_block + other, kv_head), rows, dim,
                     BLOCK, {weights, BLOCK, false});
            multiply({to.grad + at, wide, 1}, batch.transposed(to.values, first_block + other, kv_head), rows, dim,
                     BLOCK, {grads, BLOCK, false});
            softmax_backward(op, batch, block, other, to.logsums + head * batch.tokens() + block.token(), deltas,
                             weights, grads);
            multiply({weights, 1, BLOCK}, {to.grad + at, wide}, seen.count(), rows, dim,
                     {to.grad_v + seen.token() * dim, dim, true});
            multiply({grads, 1, BLOCK}, {queries, op.q_stride}, seen.count(), rows, dim,
                     {to.grad_k + seen.token() * dim, dim, true});
            multiply({grads, BLOCK, 1}, {op.k + seen.token() * op.k_stride + kv_head * dim, op.k_stride}, rows,
                     seen.count(), dim, {to.grad_q + at, wide, other > from});
        }
    }
}

}  // namespace

void eft_packed_attention(const PackedSequences* op, float* out, float* logsums, int threads) {
    const PackedBatch batch(*op);
    Scratch memory;
    float* keys = memory.floats(static_cast<size_t>(batch.transposed_size()));
    batch.transpose_all(keys, nullptr, threads);
    const auto blocks = static_cast<long>(batch.blocks().size());
    // The last blocks of a sequence see the most: they come first.
    parallel_for(threads, blocks * op->heads, [&](long task) {
        attend_block(*op, batch, keys, blocks - 1 - task / op->heads, task % op->heads, out, logsums);
    });
}

void eft_packed_attention_backward(const PackedSequences* op, const float* out, const float* logsums, const float* grad,
                                   float* grad_q, float* grad_k, float* grad_v, int threads) {
    const PackedBatch batch(*op);
    const long transposed = batch.transposed_size(), own = batch.tokens() * op->head_dim, group = batch.group();
    Scratch memory;
    float* keys = memory.floats(static_cast<size_t>(2 * transposed + 2 * own * op->heads));
    float *values = keys + transposed, *own_k = values + transposed, *own_v = own_k + own * op->heads;
    batch.transpose_all(keys, values, threads);
    // Each head by itself: those that share keys add to the same gradients.
    parallel_for(threads, op->sequences * op->heads, [&](long task) {
        const long sequence = task / op->heads, head = task % op->heads;
        const long begin = sequence > 0 ? op->ends[sequence - 1] : 0, end = op->ends[sequence];
        float *heads_k = own_k + head * own, *heads_v = own_v + head * own;
        for (float* values : {heads_k, heads_v})
            std::fill(values + begin * op->head_dim, values + end * op->head_dim, 0.0f);
        attend_backward(*op, batch, sequence, head, {keys, values, out, logsums, grad, grad_q, heads_k, heads_v});
    });
    const long dim = op->head_dim, kv_heads = op->kv_heads;
    parallel_for(threads, (batch.tokens() + BLOCK - 1) / BLOCK, [&](long task) {
        for (long token = task * BLOCK; token < std::min(batch.tokens(), (task + 1) * BLOCK); token++)
            for (long kv_head = 0; kv_head < kv_heads; kv_head++)
                for (long d = 0; d < dim; d += W) {
                    vf sum_k = {}, sum_v = {};
                    for (long head = kv_head * group; head < (kv_head + 1) * group; head++) {
                        sum_k += load(own_k + head * own + token * dim + d);
                        sum_v += load(own_v + head * own + token * dim + d);
                    }
                    const long at = (token * kv_heads + kv_head) * dim + d;
                    store(grad_k + at, sum_k);
                    store(grad_v + at, sum_v);
                }
    });
}
