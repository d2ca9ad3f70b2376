// What an adapter is to the ops that apply it.
#pragma once

#include <cstdint>

struct Factors;
// One adapter's factors for one linear: see `lora.cpp`.

// The tokens of a batch that an adapter is for.
struct Segment {
    const int64_t* tokens;  // or null: all of the batch
    int64_t count;
    const Factors* factors;

    long token(long i) const { return tokens ? tokens[i] : i; }
};
