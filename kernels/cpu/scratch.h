// Memory that an op needs while it runs; kept by the calling thread for the next op.
#pragma once

#include <cstdlib>
#include <new>

// AddressSanitizer finds only accesses outside of an allocation: there every op gets one that fits.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool KEEP = false;
#else
constexpr bool KEEP = true;
#endif

class Scratch {
   public:
    ~Scratch() { std::free(memory_); }

    // At least `count` bytes, aligned to a cache line; what was there before is lost.
    char* bytes(size_t count) {
        if (count > size_ || !KEEP) {
            std::free(memory_);
            if (posix_memalign(&memory_, 64, count) != 0) memory_ = nullptr;
            size_ = memory_ ? count : 0;
            if (memory_ == nullptr) throw std::bad_alloc();
        }
        return static_cast<char*>(memory_);
    }

    float* floats(size_t count) { return reinterpret_cast<float*>(bytes(count * sizeof(float))); }

   private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};
