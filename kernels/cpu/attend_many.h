// Queries side by side in vectors, and which of a chunk's tokens they meet.
//
// A chunk of one key/value head has a type of its own for each way to multiply it (`Stored` in `attend_many.cpp`):
//   struct Session                                  that a thread has while it multiplies
//   static long width(op)                           features that queries and sums have room for
//   static void prepare(op, float* queries)         [dim][LANES] as `score` takes them, in place
//   static long memory(op)                          floats that `fill` needs
//   void fill(op, chunk, kv_head, float* memory)
//   const float* scales(op)                         of the values at each place, or null
// and two functions:
//   score(span, stored, queries, op, scores)        scores [CHUNK][LANES] of the span's keys, and of some around them
//                                                   that mean nothing
//   mix(span, stored, weights, shrink, dim, acc)    acc [width][LANES] times `shrink`, plus the values times weights
//                                                   [CHUNK][LANES], which may be overwritten
#pragma once

#include "attention.h"

constexpr int MV = 3;
// Vectors of queries. Three: groups of three heads fill them, and there are registers for them.
constexpr int LANES = MV * W;

// Those places of a chunk that some of the queries see.
struct Span {
    long base, from, to;
};
