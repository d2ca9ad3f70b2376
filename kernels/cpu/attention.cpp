// Causal grouped-query attention over the paged cache, read in place by block tables.
//
// Rows and key/value heads are independent tasks. So that one long row does not keep a single thread busy,
// decoding cuts a row's tokens into splits of fixed length and merges their results in order.
#include "attention.h"

#include <atomic>
#include <vector>

#include "exports.h"
#include "scratch.h"
#include "threading.h"

namespace {

// A row of one token, and where the results of its splits go: [splits][kv_heads][partial_size].
struct DecodeRow {
    long row, first_split, splits;
    float* partials;
    long tasks;  // that it is cut into
};

struct AttentionTask {
    long row, decode;  // an index into the decodes, or -1
    long first, count;  // positions; or the split
    long kv_head, kv_end;
};

// Tasks for each thread at least, where there is enough work: threads that are late do less of it.
constexpr long TASKS_PER_THREAD = 8;
// Tiles of queries in a task at most: they share the chunks that are widened for them.
constexpr long MAX_TILES_PER_TASK = 4;

// Merges the splits of one row and key/value head into the row's output.
void merge_splits(const Attention& op, const DecodeRow& decode, long kv_head) {
    const long group = op.group(), padded = op.padded(), step = op.kv_heads * partial_size(op);
    float* first = decode.partials + kv_head * partial_size(op);
    for (long g = 0; g < group; g++) {
        float* acc = first + g * padded;
        vf total = splat(first[group * padded + g]), running_max = splat(first[group * padded + group + g]);
        for (long split = 1; split < decode.splits; split++) {
            const float* other = first + split * step;
            vf keep, add;
            merge_softmax(running_max, total, splat(other[group * padded + group + g]),
                          splat(other[group * padded + g]), keep, add);
            for (long d = 0; d < padded; d += W)
                store(acc + d, fmadd(add, load(other + g * padded + d), keep * load(acc + d)));
        }
        write_sums(op, acc, 1.0f / total[0],
                   op.out + (op.extents[3 * decode.row] * op.heads + kv_head * group + g) * op.dim);
    }
}

// Tiles of queries that are worth one task: the more, the less often a chunk is widened.
long tiles_at_once(const Attention& op, long rows, int threads) {
    const long alone = positions_at_once(op, 1);
    long tiles = 0;
    for (long row = 0; row < rows; row++)
        if (const long count = op.extents[3 * row + 1]; count > 1) tiles += (count + alone - 1) / alone * op.kv_heads;
    return std::clamp(tiles / (TASKS_PER_THREAD * threads), 1L, MAX_TILES_PER_TASK);
}

struct AttentionPlan {
    std::vector<DecodeRow> decodes;
    std::vector<AttentionTask> tasks;

    void make(const Attention& op, long rows, int threads, Scratch& scratch) {
        decodes.clear();
        tasks.clear();
        long splits = 0;
        for (long row = 0; row < rows; row++)
            if (op.extents[3 * row + 1] == 1) {
                const long last = op.extents[3 * row + 2], first_split = op.first_visible(last) / SPLIT_TOKENS;
                decodes.push_back({row, first_split, last / SPLIT_TOKENS + 1 - first_split, nullptr, 0});
                splits += decodes.back().splits;
            }
        // Heads of a token lie together in memory: one task takes as many as leave enough tasks.
        const long enough = std::max(1L, splits * op.kv_heads / (TASKS_PER_THREAD * threads));
        const long heads = std::min(op.kv_heads, enough);
        float* memory = scratch.floats(static_cast<size_t>(splits * op.kv_heads * partial_size(op)));
        for (size_t i = 0; i < decodes.size(); i++) {
            DecodeRow& decode = decodes[i];
            decode.partials = memory;
            memory += decode.splits * op.kv_heads * partial_size(op);
            for (long split = 0; split < decode.splits; split++)
                for (long head = 0; head < op.kv_heads; head += heads, decode.tasks++)
                    tasks.push_back(
                        {decode.row, static_cast<long>(i), split, 0, head, std::min(head + heads, op.kv_heads)});
        }
        const long step = positions_at_once(op, tiles_at_once(op, rows, threads));
        for (long row = 0; row < rows; row++) {
            const long count = op.extents[3 * row + 1];
            if (count < 2) continue;
            // The last positions see the most tokens, so they go first.
            for (long first = (count - 1) / step * step; first >= 0; first -= step)
                for (long head = 0; head < op.kv_heads; head++)
                    tasks.push_back({row, -1, first, std::min(step, count - first), head, head + 1});
        }
    }
};

KvSplit split_of(const Attention& op, const AttentionPlan& plan, const AttentionTask& task) {
    const long last = op.extents[3 * task.row + 2];
    const long begin = (plan.decodes[static_cast<size_t>(task.decode)].first_split + task.first) * SPLIT_TOKENS;
    return {task.row, std::max(begin, op.first_visible(last)), std::min(begin + SPLIT_TOKENS, last + 1), task.kv_head,
            task.kv_end};
}

// `after`: the task that is most likely this thread's next.
void compute(const Attention& op, const AttentionPlan& plan, const AttentionTask& task, const AttentionTask& after,
             std::atomic<long>* left) {
    if (task.decode < 0) return attend_prefill(op, task.row, task.first, task.count, task.kv_head);
    const DecodeRow& decode = plan.decodes[static_cast<size_t>(task.decode)];
    attend_decode(op, split_of(op, plan, task), split_of(op, plan, after.decode < 0 ? task : after),
                  decode.partials + (task.first * op.kv_heads + task.kv_head) * partial_size(op));
    // The thread that computes the last of a row's splits merges them.
    if (left[task.decode].fetch_sub(1, std::memory_order_acq_rel) == 1)
        for (long head = 0; head < op.kv_heads; head++) merge_splits(op, decode, head);
}

}  // namespace

void eft_paged_attention(const float* q, long q_stride, const char* keys, const char* values,
                                const int64_t* tables, long width, const int64_t* extents, long rows, long heads,
                                long kv_heads, long dim, long block_size, float scale, long window, float softcap,
                                float* out, int type, int threads) {
    static thread_local Scratch scratch;
    static thread_local AttentionPlan plan;
    const Attention op{q,   q_stride,   keys,  values, tables,  width, extents, heads, kv_heads,
                       dim, block_size, scale, window, softcap, out,   type};
    plan.make(op, rows, threads, scratch);
    std::vector<std::atomic<long>> left(plan.decodes.size());
    for (size_t i = 0; i < left.size(); i++) left[i].store(plan.decodes[i].tasks, std::memory_order_relaxed);
    const AttentionPlan& made = plan;
    const auto count = static_cast<long>(made.tasks.size());
    // Neighbours to each thread: which task is its next must be known for what is asked for to arrive where it is
    // needed.
    WorkStealingRanges ranges(count, threads);
    in_parallel(static_cast<int>(std::min<long>(count, threads)), [&] {
        ranges.run([&](long i, bool more) {
            const auto at = static_cast<size_t>(i);
            compute(op, made, made.tasks[at], made.tasks[more ? at + 1 : at], left.data());
        });
    });
}
