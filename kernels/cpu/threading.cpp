#include "threading.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "exports.h"

namespace {

using Clock = std::chrono::steady_clock;

// Microseconds to spin before sleeping: more than Python takes from one op of a layer to the next.
constexpr long SPIN_MICROSECONDS = 200;
// The same where one op follows the other at once: a thread that waits for longer waits for one that does not run, and
// leaves its core to those that keep it from running.
constexpr long SHORT_SPIN_MICROSECONDS = 20;
std::atomic<long> spin_microseconds{SPIN_MICROSECONDS};

void spin_pause() {
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

// The threads beside the calling one. They live as long as the process.
class ThreadPool {
   public:
    void call(int threads, void (*body)(void*), void* data) {
        // A second caller at the same time works alone.
        if (busy_.test_and_set(std::memory_order_acquire)) return body(data);
        for (; num_started_ < threads - 1; num_started_++)
            if (!start()) break;
        body_ = body;
        data_ = data;
        admission_.value.store(static_cast<uint32_t>(threads - 1) * ADMIT_ONE);
        num_calls_.value.fetch_add(1);
        num_calls_.notify(threads - 1);
        body(data);
        admission_.value.fetch_and(ADMIT_ONE - 1);  // no thread enters any more
        admission_.wait(0);
        busy_.clear(std::memory_order_release);
    }

   private:
    // Unit of the count of threads that may still enter; the count of those inside is below it.
    static constexpr uint32_t ADMIT_ONE = 1 << 16;

    bool start() {
        const auto run = [](void* pool) -> void* {
            static_cast<ThreadPool*>(pool)->work();
            return nullptr;
        };
        // Signals are left to Python's threads.
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
        for (uint32_t seen = 0;; seen = num_calls_.value.load()) {
            if (try_enter()) {
                body_(data_);
                if (admission_.value.fetch_sub(1) == 1) admission_.notify();
            }
            num_calls_.wait(seen, true);
        }
    }

    bool try_enter() {
        uint32_t admission = admission_.value.load();
        while (admission >= ADMIT_ONE)
            if (admission_.value.compare_exchange_weak(admission, admission - ADMIT_ONE + 1)) return true;
        return false;
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    int num_started_ = 0;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    alignas(64) WaitableCounter num_calls_;  // number of calls so far
    alignas(64) WaitableCounter admission_;  // ADMIT_ONE times the threads that may still enter, plus those inside
};

ThreadPool* pool = nullptr;

}  // namespace

void WaitableCounter::wait(uint32_t awaited, bool until_different) {
    const auto reached = [&](uint32_t now) { return (now == awaited) != until_different; };
    if (reached(value.load())) return;
    const std::chrono::microseconds spin(spin_microseconds.load(std::memory_order_relaxed));
    for (const auto end = Clock::now() + spin; Clock::now() < end;)
        for (int i = 0; i < 16; i++, spin_pause())
            if (reached(value.load(std::memory_order_acquire))) return;
    sleepers.fetch_add(1);
    for (uint32_t now; !reached(now = value.load());) futex(value, FUTEX_WAIT, now);
    sleepers.fetch_sub(1);
}

void WaitableCounter::wake(int max_waiters) { futex(value, FUTEX_WAKE, static_cast<uint32_t>(max_waiters)); }

ShortSpinScope::ShortSpinScope() { spin_microseconds.store(SHORT_SPIN_MICROSECONDS, std::memory_order_relaxed); }

ShortSpinScope::~ShortSpinScope() { spin_microseconds.store(SPIN_MICROSECONDS, std::memory_order_relaxed); }

void run_on_pool(int threads, void (*body)(void*), void* data) {
    static const int once = [] {
        pool = new ThreadPool;
        // A forked process has none of the threads.
        return pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    }();
    (void)once;
    pool->call(threads, body, data);
}

int eft_permitted() {
#if defined(__AMX_INT8__)
    // From Linux's headers, which may be older than AMX.
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 1;
#endif
}
