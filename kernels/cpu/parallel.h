// Work shared over the threads of the process's own OpenMP pool.
//
// The pool is torch's: its entry points are handed in when the library is loaded (`eft_use_pool`), so no
// OpenMP runtime is linked, and there are never two of them in one process. Tasks are claimed one by one,
// so a thread that another process keeps from running leaves its work to the others.
#pragma once

#include <atomic>

#include "simd.h"

// As in libgomp, and in LLVM's libomp, which has the same entry point.
using PoolEntry = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

extern PoolEntry pool_entry;

// Hands out the numbers from 0 to count - 1, each once.
struct Tasks {
    explicit Tasks(long count) : count(count) {}

    bool claim(long& task) {
        task = next.fetch_add(1, std::memory_order_relaxed);
        return task < count;
    }

    const long count;
    alignas(64) std::atomic<long> next{0};
};

// Calls body() once in each of `threads` threads, and returns when all have.
template <typename Body>
void in_parallel(int threads, Body body) {
    if (threads <= 1 || pool_entry == nullptr) {
        body();
        return;
    }
    pool_entry([](void* data) { (*static_cast<Body*>(data))(); }, &body, static_cast<unsigned>(threads), 0);
}

// Calls body(task) for every task.
template <typename Body>
void for_each(int threads, long count, Body&& body) {
    Tasks tasks(count);
    auto work = [&] {
        long task;
        while (tasks.claim(task)) body(task);
    };
    in_parallel(count < threads ? static_cast<int>(count) : threads, work);
}

// A first phase of tasks that all must be done before anybody goes on to the second. Whoever comes first
// does what there is, so nobody waits for a thread that has not begun.
struct Phase {
    explicit Phase(long count) : tasks(count) {}

    template <typename Body>
    void run(Body&& body) {
        long task;
        while (tasks.claim(task)) {
            body(task);
            done.fetch_add(1, std::memory_order_release);
        }
        wait();
    }

    void wait();

    Tasks tasks;
    alignas(64) std::atomic<long> done{0};
};
