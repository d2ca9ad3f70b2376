// Work shared over threads, on a machine that others may use too.
//
// Tasks are claimed one by one, and no thread waits for one that has not come: if another process keeps it from
// running, the others do its work. A waiting thread spins for a moment, then sleeps, so that the one it waits for
// gets the core. That is why the threads are our own: at the end of a parallel region OpenMP waits for every thread,
// and libgomp spins so long meanwhile that beside one busy process SmolLM2 decodes at a seventieth of its speed; where
// it is set to spin for less it sleeps between ops, which costs a seventh on a quiet machine.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

#include "simd.h"

// A number that threads wait for a change of: a futex with a spin before it sleeps.
struct WaitableCounter {
    // Returns when `value` is `awaited`, or, with `until_different`, when it is not.
    void wait(uint32_t awaited, bool until_different = false);

    // Call after a change to a value that others wait for: wakes at most `max_waiters` of them.
    void notify(int max_waiters = INT_MAX) {
        if (sleepers.load() > 0) wake(max_waiters);
    }

    std::atomic<uint32_t> value{0};

   private:
    void wake(int max_waiters);

    std::atomic<uint32_t> sleepers{0};
};

// Hands out the numbers from 0 to count - 1, each once.
struct TaskQueue {
    explicit TaskQueue(long count) : count(count) {}

    bool claim(long& task) {
        task = next.fetch_add(1, std::memory_order_relaxed);
        return task < count;
    }

    const long count;
    alignas(64) std::atomic<long> next{0};
};

// While there is one, ops follow each other at once, so threads that wait for the next one soon sleep.
struct ShortSpinScope {
    ShortSpinScope();
    ~ShortSpinScope();
    ShortSpinScope(const ShortSpinScope&) = delete;
    ShortSpinScope& operator=(const ShortSpinScope&) = delete;
};

// Calls body(data) in this thread and in those of `threads` - 1 others that come in time.
void run_on_pool(int threads, void (*body)(void*), void* data);

// Calls body() in at most `threads` threads, and returns when all that began have ended. It must do all the work that
// there is wherever it is called alone.
template <typename Body>
void in_parallel(int threads, Body body) {
    if (threads <= 1) return body();
    run_on_pool(threads, [](void* data) { (*static_cast<Body*>(data))(); }, &body);
}

// Calls body(task) for every task.
template <typename Body>
void parallel_for(int threads, long count, Body&& body) {
    TaskQueue tasks(count);
    auto work = [&] {
        long task;
        while (tasks.claim(task)) body(task);
    };
    in_parallel(count < threads ? static_cast<int>(count) : threads, work);
}

// A first phase of tasks that all must be done before any thread continues with the second. The threads that come
// first do what there is, so none waits for a thread that has not begun.
struct Phase {
    explicit Phase(long count) : tasks(count) {}

    template <typename Body>
    void run(Body&& body) {
        work(body);
        wait();
    }

    // `run` without waiting for others: call `wait` before the second phase.
    template <typename Body>
    void work(Body&& body) {
        const auto all = static_cast<uint32_t>(tasks.count);
        long task;
        while (tasks.claim(task)) {
            body(task);
            if (done.value.fetch_add(1) + 1 == all) done.notify();
        }
    }

    void wait() { done.wait(static_cast<uint32_t>(tasks.count)); }

    TaskQueue tasks;
    alignas(64) WaitableCounter done;
};

// Tasks in as many ranges of neighbours as there are threads.
//
// Every thread walks through a range of its own, so what it reads lies in one piece and what it asked for early is for
// itself; when it is done it helps with the others, so none waits for a thread that does not come.
class WorkStealingRanges {
   public:
    WorkStealingRanges(long tasks, int threads) : count_(std::clamp(threads, 1, MAX_RANGES)) {
        for (int i = 0; i < count_; i++) {
            ranges_[i].next = tasks * i / count_;
            ranges_[i].end = tasks * (i + 1) / count_;
        }
    }

    // The range of the calling thread.
    int own_range() { return num_joined_.fetch_add(1, std::memory_order_relaxed) % count_; }

    // The task that comes next in a range, or some number beyond its end.
    long next_task(int range) const { return ranges_[range].next.load(std::memory_order_relaxed); }

    // Calls body(task, more) for every task that is left; `more`: the next one will most likely be this thread's as
    // well. To be called by each thread once.
    template <typename Body>
    void run(int own, Body&& body) {
        for (int i = 0; i < count_; i++) {
            Range& range = ranges_[(own + i) % count_];
            for (long task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
                body(task, task + 1 < range.end);
        }
    }

    template <typename Body>
    void run(Body&& body) {
        run(own_range(), body);
    }

   private:
    // Threads beyond this number share ranges.
    static constexpr int MAX_RANGES = 64;

    struct alignas(64) Range {
        std::atomic<long> next;
        long end;
    };

    Range ranges_[MAX_RANGES];
    const int count_;
    std::atomic<int> num_joined_{0};
};
