#include "parallel.h"

#include <sched.h>

#include "export.h"

PoolEntry pool_entry = nullptr;

void Phase::wait() {
    for (int spins = 0; done.load(std::memory_order_acquire) < tasks.count; spins++)
        if (spins > 1000) sched_yield();
}

// Takes the address of GOMP_parallel; without it everything runs in the calling thread.
EXPORT void eft_use_pool(PoolEntry entry) { pool_entry = entry; }

// How many floats a vector has.
EXPORT int eft_vector_width() { return W; }
