// Causal grouped-query attention over the paged cache, read in place by block tables.
//
// Rows and key/value heads are independent tasks. So that one long row does not keep a single thread busy,
// decoding cuts a row's tokens into parts of fixed length and joins their results in order.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "export.h"
#include "parallel.h"
#include "scratch.h"

namespace {

struct Task {
    long row, first, count, kv_head, begin, end;
    float* partial;  // where a decode task's result goes: [group][dim], then totals and maxima [group]; or null
};

INLINE long partial_size(const Attention& op) { return op.group() * (op.dim + 2); }

void compute(const Attention& op, const Task& task) {
    if (task.partial == nullptr) return attend_many(op, task.row, task.first, task.count, task.kv_head);
    float* total = task.partial + op.group() * op.dim;
    attend_one(op, task.row, op.extents[3 * task.row], task.kv_head, task.begin, task.end, task.partial, total,
               total + op.group());
}

// Joins the parts of one row and key/value head, which lie one after the other; their maxima become their weights.
void join(const Attention& op, const Task* parts, long count) {
    const long group = op.group();
    for (long g = 0; g < group; g++) {
        const auto total_of = [&](long i) { return parts[i].partial[group * op.dim + g]; };
        const auto top_of = [&](long i) -> float& { return parts[i].partial[group * op.dim + group + g]; };
        float top = top_of(0);
        for (long i = 1; i < count; i++) top = std::max(top, top_of(i));
        vf total = {};
        for (long i = 0; i < count; i++) {
            const vf weight = exp(splat(top_of(i) - top));
            total = fused(weight, splat(total_of(i)), total);
            top_of(i) = weight[0];
        }
        const vf one = splat(1.0f / total[0]);
        float* out = op.out + (op.extents[3 * parts[0].row] * op.heads + parts[0].kv_head * group + g) * op.dim;
        for (long d = 0; d < op.dim; d += W) {
            vf joined = {};
            for (long i = 0; i < count; i++)
                joined = fused(splat(top_of(i)), load(parts[i].partial + g * op.dim + d), joined);
            store(out + d, joined * one);
        }
    }
}

// A row's tasks for each key/value head.
void plan(const Attention& op, long row, std::vector<Task>& tasks) {
    const long count = op.extents[3 * row + 1], context = op.extents[3 * row + 2];
    for (long head = 0; head < op.kv_heads; head++) {
        if (count == 1 && can_attend_one(op.dim)) {
            for (long begin = 0; begin <= context; begin += PART)
                tasks.push_back({row, 0, 1, head, begin, std::min(begin + PART, context + 1), nullptr});
            continue;
        }
        const long step = positions_at_once(op);
        // The last positions see the most tokens, so they go first.
        for (long first = (count - 1) / step * step; first >= 0; first -= step)
            tasks.push_back({row, first, std::min(step, count - first), head, 0, 0, nullptr});
    }
}

}  // namespace

// See `Attention` for the arguments; q may be a part of a larger row, `q_stride` floats long.
EXPORT void eft_paged_attention(const float* q, long q_stride, const char* keys, const char* values,
                                const int64_t* tables, long width, const int64_t* extents, long rows, long heads,
                                long kv_heads, long dim, long block_size, float scale, float* out, int type, int threads) {
    static thread_local Scratch scratch;
    static thread_local std::vector<Task> tasks;
    const Attention op{q,       q_stride, keys,       values, tables, width, extents, heads,
                       kv_heads, dim,      block_size, scale,  out,   type};
    tasks.clear();
    for (long row = 0; row < rows; row++) plan(op, row, tasks);
    const auto decodes = [](const Task& task) { return task.end > 0; };
    const long partials = std::count_if(tasks.begin(), tasks.end(), decodes);
    float* memory = scratch.floats(static_cast<size_t>(partials * partial_size(op)));
    for (Task& task : tasks)
        if (decodes(task)) {
            task.partial = memory;
            memory += partial_size(op);
        }
    const std::vector<Task>& all = tasks;
    for_each(threads, static_cast<long>(all.size()), [&](long i) {
        const Task& task = all[i];
        compute(op, task);
        if (decodes(task) && task.begin == 0 && task.end == op.extents[3 * task.row + 2] + 1) join(op, &task, 1);
    });
    for (size_t i = 0, parts; i < all.size(); i += parts) {
        parts = 1;
        if (!decodes(all[i])) continue;
        while (i + parts < all.size() && all[i + parts].begin > 0) parts++;
        if (parts > 1) join(op, &all[i], static_cast<long>(parts));
    }
}
