// Tasks in as many ranges of neighbours as there are threads.
#pragma once

#include <algorithm>
#include <atomic>

// Every thread walks through a range of its own, so what it reads lies in one piece and what it asked for early is for
// itself; when it is done it helps with the others, so nobody waits for a thread that does not come.
class Ranges {
   public:
    Ranges(long tasks, int threads) : count_(std::clamp(threads, 1, MOST)) {
        for (int i = 0; i < count_; i++) {
            ranges_[i].next = tasks * i / count_;
            ranges_[i].end = tasks * (i + 1) / count_;
        }
    }

    // The range of the calling thread.
    int arrive() { return arrived_.fetch_add(1, std::memory_order_relaxed) % count_; }

    // The task that comes next in a range, or some number beyond its end.
    long first_of(int range) const { return ranges_[range].next.load(std::memory_order_relaxed); }

    // Calls body(task, more) for every task that is left; `more`: the next one will most likely be this thread's as well.
    // To be called by each thread once.
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
        run(arrive(), body);
    }

   private:
    static constexpr int MOST = 64;

    struct alignas(64) Range {
        std::atomic<long> next;
        long end;
    };

    Range ranges_[MOST];
    const int count_;
    std::atomic<int> arrived_{0};
};
