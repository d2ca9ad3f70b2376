#include "parallel.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "export.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr long PATIENCE = 200;
// Microseconds to spin before sleeping: more than Python takes from one op of a layer to the next.
constexpr long PATIENCE_IN_A_ROW = 20;
// Where one op follows the other at once: who has to wait for longer waits for a thread that does not run, and had better
// leave the core to those that keep it from running.
std::atomic<long> patience{PATIENCE};

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof word == sizeof value);
    return syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// The threads beside the one that asks for a team. They live as long as the process.
class Pool {
   public:
    void call(int threads, void (*body)(void*), void* data) {
        // A second caller at the same time works alone.
        if (taken_.test_and_set(std::memory_order_acquire)) return body(data);
        for (; running_ < threads - 1; running_++)
            if (!start()) break;
        body_ = body;
        data_ = data;
        doors_.value.store(static_cast<uint32_t>(threads - 1) * PLACE);
        calls_.value.fetch_add(1);
        calls_.changed(threads - 1);
        body(data);
        doors_.value.fetch_and(PLACE - 1);  // nobody comes in any more
        doors_.wait(0);
        taken_.clear(std::memory_order_release);
    }

   private:
    static constexpr uint32_t PLACE = 1 << 16;

    bool start() {
        const auto run = [](void* pool) -> void* {
            static_cast<Pool*>(pool)->work();
            return nullptr;
        };
        // Signals are for threads that Python knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_t thread;
        const bool started = pthread_create(&thread, nullptr, run, this) == 0;
        if (started) pthread_detach(thread);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void work() {
        for (uint32_t seen = 0;; seen = calls_.value.load()) {
            if (enter()) {
                body_(data_);
                if (doors_.value.fetch_sub(1) == 1) doors_.changed();
            }
            calls_.wait(seen, true);
        }
    }

    bool enter() {
        uint32_t doors = doors_.value.load();
        while (doors >= PLACE)
            if (doors_.value.compare_exchange_weak(doors, doors - PLACE + 1)) return true;
        return false;
    }

    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
    int running_ = 0;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    alignas(64) Awaited calls_;  // how many there were
    alignas(64) Awaited doors_;  // PLACE times who may come in yet, plus who is in
};

Pool* pool = nullptr;

}  // namespace

void Awaited::wait(uint32_t wanted, bool other) {
    const auto over = [&](uint32_t now) { return (now == wanted) != other; };
    if (over(value.load())) return;
    const std::chrono::microseconds spin(patience.load(std::memory_order_relaxed));
    for (const auto end = Clock::now() + spin; Clock::now() < end;)
        for (int i = 0; i < 16; i++, relax())
            if (over(value.load(std::memory_order_acquire))) return;
    sleepers.fetch_add(1);
    for (uint32_t now; !over(now = value.load());) futex(value, FUTEX_WAIT, now);
    sleepers.fetch_sub(1);
}

void Awaited::wake(int most) { futex(value, FUTEX_WAKE, static_cast<uint32_t>(most)); }

OpsInARow::OpsInARow() { patience.store(PATIENCE_IN_A_ROW, std::memory_order_relaxed); }

OpsInARow::~OpsInARow() { patience.store(PATIENCE, std::memory_order_relaxed); }

void call_in_team(int threads, void (*body)(void*), void* data) {
    static const int once = [] {
        pool = new Pool;
        // A forked process has none of the threads.
        return pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    }();
    (void)once;
    pool->call(threads, body, data);
}

// How many floats a vector has.
EXPORT int eft_vector_width() { return W; }
