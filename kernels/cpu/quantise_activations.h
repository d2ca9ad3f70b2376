// Rows of activations on their way to bytes: normalised where a norm comes first, then integers with a scale.
//
// value = integer * scale. One scale for a row as it is would not do, since outliers leave too little of a byte for the
// rest: either each group of 32 has its own, or the row is rotated first (`row_transforms.h`).
#pragma once

#include <algorithm>
#include <cmath>

#include "int8_dot.h"
#include "row_transforms.h"
#include "scratch.h"

// The integer that the largest activation of those with one scale becomes.
constexpr float INT8_MAX_VALUE = 127.0f;

struct ActivationQuantiser {
    const float* x;
    long stride;  // floats from one row to the next
    long in;
    const float* norm;  // or null
    float eps;

    // Calls take(integers, k) for every W rotated features from k on, up to a whole number of blocks, and returns the
    // row's scale. A row that is not finite has such a scale, and so have its outputs, whatever the integers are.
    template <typename Take>
    INLINE float quantise_rotated(long row, Take&& take) const {
        static thread_local Scratch scratch;
        const long size = (in + HADAMARD_SIZE - 1) / HADAMARD_SIZE * HADAMARD_SIZE;
        float* rotated = scratch.floats(static_cast<size_t>(size));
        const float* from = x + row * stride;
        const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
        AbsMax abs_maxima;
        for (long block = 0; block < size; block += HADAMARD_SIZE) {
            vf v[HADAMARD_VECTORS];
#pragma GCC unroll 16
            for (int i = 0; i < HADAMARD_VECTORS; i++) v[i] = values(from, block + i * W, inverse);
            hadamard(v);
#pragma GCC unroll 16
            for (int i = 0; i < HADAMARD_VECTORS; i++) {
                abs_maxima.add(v[i]);
                store(rotated + block + i * W, v[i]);
            }
        }
        const float abs_max = abs_maxima.value() * HADAMARD_SCALE,
                    factor = inverse_scales(splat(abs_max))[0] * HADAMARD_SCALE;
        for (long k = 0; k < size; k += W) take(integers(load(rotated + k), factor), k);
        return abs_max / INT8_MAX_VALUE;
    }

    // Writes the integers of every group of 32, zero beyond the row's end, to bytes_of(group), and calls finish(group,
    // scale, sum of the integers). What is not finite makes its group's scale so.
    template <typename BytesOf, typename Finish>
    INLINE void quantise_groups(long row, BytesOf&& bytes_of, Finish&& finish) const {
        const float* from = x + row * stride;
        const float inverse = norm ? inverse_rms(from, in, eps) : 1.0f;
        const long whole = in / GROUP;
        const auto quantise = [&](auto&& of) INLINE_LAMBDA {
            long first = 0;
            for (; first + W <= whole; first += W) quantise_groups_at<W>(first, of, bytes_of, finish);
            for (; first + 2 <= whole; first += 2) quantise_groups_at<2>(first, of, bytes_of, finish);
            if (first < whole) quantise_groups_at<1>(first, of, bytes_of, finish);
        };
        if (norm)
            quantise([&](long k) INLINE_LAMBDA { return load(from + k) * splat(inverse) * load(norm + k); });
        else
            quantise([&](long k) INLINE_LAMBDA { return load(from + k); });
        if (whole * GROUP < in)
            quantise_groups_at<1>(
                whole, [&](long k) INLINE_LAMBDA { return values(from, k, inverse); }, bytes_of, finish);
    }

   private:
    // COUNT groups from `first` on, W at most; of(k) gives W features from feature k on. Their largest values, and then
    // their sums, are found together.
    template <int COUNT, typename Of, typename BytesOf, typename Finish>
    static INLINE void quantise_groups_at(long first, Of&& of, BytesOf&& bytes_of, Finish&& finish) {
        vf abs_maxima[W] = {}, totals[W] = {};
#pragma GCC unroll 16
        for (int g = 0; g < COUNT; g++) {
            AbsMax found;
#pragma GCC unroll 8
            for (int i = 0; i < GROUP; i += W) found.add(of((first + g) * GROUP + i));
            abs_maxima[g] = bits(found.abs_max);
        }
        const vf abs_max =
            reduce_rows(abs_maxima, [](vf a, vf b) INLINE_LAMBDA { return bits(larger(bits(a), bits(b))); });
        const vf scales = abs_max / splat(INT8_MAX_VALUE), factors = inverse_scales(abs_max);
#pragma GCC unroll 16
        for (int g = 0; g < COUNT; g++) {
            vi q[GROUP / W], total = {};
#pragma GCC unroll 8
            for (int i = 0; i < GROUP / W; i++)
                total += q[i] = integers(of((first + g) * GROUP + i * W), factors[g]);
            store_group(q, bytes_of(first + g));
            totals[g] = bits(total);
        }
        const vi sums = bits(reduce_rows(totals, [](vf a, vf b) INLINE_LAMBDA { return bits(bits(a) + bits(b)); }));
#pragma GCC unroll 16
        for (int g = 0; g < COUNT; g++) finish(first + g, scales[g], sums[g]);
    }

    // The low bytes of a group's integers, which are from -128 to 127.
    static INLINE void store_group(const vi (&q)[GROUP / W], int8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        // In each half of these vectors lie four of every one of q, in turn.
        const __m256i low = _mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]);
        const __m256i high = _mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        std::memcpy(to, &all, GROUP);
#else
#pragma GCC unroll 8
        for (int i = 0; i < GROUP / W; i++) store_bytes(q[i], to + i * W);
#endif
    }

    static INLINE vi larger(vi a, vi b) { return a > b ? a : b; }

    // The largest size of some values; not finite if one of them is not: as integers, the bits of numbers without a
    // sign are in the numbers' order, and infinity and NaN come after all of them.
    struct AbsMax {
        vi abs_max = {};

        INLINE void add(vf v) { abs_max = larger(abs_max, bits(v) & 0x7fffffff); }

        INLINE float value() const { return bits(all<W / 2>(abs_max))[0]; }

       private:
        // The largest element, in all of them.
        template <int D>
        static INLINE vi all(vi v) {
            if constexpr (D > 0) return all<D / 2>(larger(v, bits(swapped<D>(bits(v)))));
            return v;
        }
    };

    static INLINE vf inverse_scales(vf abs_max) {
        const vf zero = {};
        return abs_max > zero && abs_max < splat(INFINITY) ? splat(INT8_MAX_VALUE) / abs_max : zero;
    }

    static INLINE vi integers(vf v, float factor) { return factor > 0.0f ? rounded(v * splat(factor)) : vi{}; }

    // W of a row's values from feature k on, normalised; zero beyond its end.
    INLINE vf values(const float* from, long k, float inverse) const {
        if (k + W <= in) return norm ? load(from + k) * splat(inverse) * load(norm + k) : load(from + k);
        float rest[W] = {};
        for (long i = k; i < in; i++) rest[i - k] = norm ? from[i] * inverse * norm[i] : from[i];
        return load(rest);
    }
};
