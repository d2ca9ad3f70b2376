// Low-rank adapters of the rows of a batch, as linears apply them: y += (scales * x A^T) B^T, in two phases before a
// linear's products. First all is shrunk, x A^T, then all is expanded, times B^T, into deltas, which `epilogue.h` adds.
//
// Every thread calls `shrink`, then `expand`, then `wait`; what else it has to do before its products goes between.
//
// A row's numbers are the same bits whatever its batch: shrunk values are sums in W lanes along the inputs, which are
// then added in halves; of an output the ranks are added in their order, and the sum to what was there.
#pragma once

#include <vector>

#include "exports.h"
#include "scratch.h"
#include "threading.h"

// Outputs of a tile of B.
constexpr long LORA_TILE = 64;

// Inputs of a linear, the norm before it, and the number of the weight's outputs.
struct LoraInputs {
    const float* x;
    long stride;  // floats from one row to the next
    long rows, in, out;
    const float* norm;  // or null
    float eps;

    // Floats of a row of deltas: whole tiles.
    long width() const { return (out + LORA_TILE - 1) / LORA_TILE * LORA_TILE; }
};

// What adapters add to the rows of a batch. One at a time in a thread.
class LoraDeltas {
 public:
    // `lora` may be null: no row has an adapter then.
    LoraDeltas(const LoraBatch* lora, const LoraInputs& inputs);

    // This, or null where no row has an adapter.
    LoraDeltas* get() { return rows_ ? this : nullptr; }

    // [rows], each null, or where what is added to the row's outputs begins; complete after `wait`. Null as `get`.
    const float* const* rows() const { return rows_; }

    // Shrinks what there is to shrink, without waiting for other threads.
    void shrink();

    // Waits until all is shrunk, and expands what there is to expand.
    void expand();

    // Returns when all is expanded.
    void wait() { expands_.wait(); }

 private:
    // Some tokens of a segment, and some of its ranks or tiles.
    struct Task {
        const LoraTokens* segment;
        float *shrunk, *deltas;  // [count][rank] and [count][width]: the segment's
        long begin, end, first, last;
    };

    // The thread's memory.
    struct Plan {
        std::vector<Task> shrinks, expands;
        Scratch memory;
    };

    static Plan& plan_of_thread();
    // Fills the thread's plan; returns `rows`.
    static const float* const* make_plan(const LoraBatch* lora, const LoraInputs& inputs);
    template <typename T>
    void shrink(const Task& task) const;

    const LoraInputs inputs_;
    const float* const* const rows_;
    const Plan& plan_;
    Phase shrinks_, expands_;
};
