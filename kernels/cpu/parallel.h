// Work shared over threads, on a machine that others may use too.
//
// Tasks are claimed one by one, and nobody waits for a thread that has not come: whom another process keeps from
// running leaves its work to the others. Who waits spins for a moment, then sleeps, so that whoever is waited for
// gets the core. That is why the threads are our own: at the end of a parallel region OpenMP waits for every thread,
// and libgomp spins so long meanwhile that beside one busy process SmolLM2 decodes at a seventieth of its speed; where
// it is told to spin for less it sleeps between ops, which costs a seventh on a quiet machine.
#pragma once

#include <atomic>
#include <climits>
#include <cstdint>

#include "simd.h"

// A number that threads wait for.
struct Awaited {
    // Returns when `value` is `wanted`, or, with `other`, when it is not.
    void wait(uint32_t wanted, bool other = false);

    // To be called by whoever changed it to what others wait for: wakes `most` of them at most.
    void changed(int most = INT_MAX) {
        if (sleepers.load() > 0) wake(most);
    }

    std::atomic<uint32_t> value{0};

   private:
    void wake(int most);

    std::atomic<uint32_t> sleepers{0};
};

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

// While there is one, ops follow each other at once, so threads that wait for the next one soon sleep.
struct OpsInARow {
    OpsInARow();
    ~OpsInARow();
    OpsInARow(const OpsInARow&) = delete;
    OpsInARow& operator=(const OpsInARow&) = delete;
};

// Calls body(data) in this thread and in those of `threads` - 1 others that come in time.
void call_in_team(int threads, void (*body)(void*), void* data);

// Calls body() in at most `threads` threads, and returns when all that began have ended. It must do all the work that
// there is wherever it is called alone.
template <typename Body>
void in_parallel(int threads, Body body) {
    if (threads <= 1) return body();
    call_in_team(threads, [](void* data) { (*static_cast<Body*>(data))(); }, &body);
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
        const auto all = static_cast<uint32_t>(tasks.count);
        long task;
        while (tasks.claim(task)) {
            body(task);
            if (done.value.fetch_add(1) + 1 == all) done.changed();
        }
        done.wait(all);
    }

    Tasks tasks;
    alignas(64) Awaited done;
};
