// Products of rows of bytes with weights in bytes as they lie, [out][in]: for weights of which a rank holds some inputs.
//
// Sums are of integers and exact, in any order.
#include <algorithm>

#include "export.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace {

constexpr long BYTES = 4 * W;
// In a vector.
constexpr int OUTPUTS = 4, ROWS = W / OUTPUTS;
// Multiplied at once: as many sums as a vector has lanes.
constexpr long SHARE = 64;
// Outputs of one task, and rows that they are multiplied with before the next ones: both stay in the cache.

#if defined(__AVX512VNNI__)
constexpr int8_t SHIFT = -128;
#else
constexpr int8_t SHIFT = 0;
#endif
// What is flipped in the rows' bytes: VNNI wants them from 0 to 255, 128 more, which is taken off again at the end.

// acc + four products in each lane. Rows' bytes are from -128 to 127, weights from -127: pairs fit in 16 bits.
INLINE vi add_products(vi acc, vi x, vi w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#elif defined(__AVX512F__)
    const __m512i v = (__m512i)w;
    const __m512i signed_w = _mm512_mask_sub_epi8(v, _mm512_movepi8_mask((__m512i)x), _mm512_setzero_si512(), v);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)x), signed_w);
    return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)w, (__m256i)x));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) acc += ((x << (24 - 8 * byte)) >> 24) * ((w << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

INLINE vi load_bytes(const int8_t* from, long count = BYTES) {
    vi v = {};
    std::memcpy(&v, from, static_cast<size_t>(count));
    return v;
}

// Lane i of the result is the sum over lanes[i].
INLINE vi sums_of(vi (&lanes)[W]) {
#pragma GCC unroll 4
    for (int n = W; n > 1; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; i++) {
            const vf a = bits(lanes[i]), b = bits(lanes[i + n / 2]);
            lanes[i] = bits(interleave<false>(a, b)) + bits(interleave<true>(a, b));
        }
    }
    return lanes[0];
}

// ROWS rows times OUTPUTS outputs: lane r * OUTPUTS + n is row r's output n. `whole`: there are bytes up to a whole vector
// beyond every output's own, which meet zeros.
INLINE vi products(const int8_t* const (&x)[ROWS], const int8_t* const (&w)[OUTPUTS], long in, bool whole) {
    vi lanes[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) lanes[i] = vi{};
    const auto step = [&](long k, long count) INLINE_LAMBDA {
        vi weights[OUTPUTS];
#pragma GCC unroll 4
        for (int n = 0; n < OUTPUTS; n++) weights[n] = load_bytes(w[n] + k, count);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const vi bytes = load_bytes(x[r] + k);
#pragma GCC unroll 4
            for (int n = 0; n < OUTPUTS; n++)
                lanes[r * OUTPUTS + n] = add_products(lanes[r * OUTPUTS + n], bytes, weights[n]);
        }
    };
    long k = 0;
    for (; k + BYTES <= in; k += BYTES) step(k, BYTES);
    if (k < in && whole)
        step(k, BYTES);
    else if (k < in)
        step(k, in - k);
    return sums_of(lanes);
}

}  // namespace

// x [rows, in] times values [out, in], `stride` bytes from one output to the next, whose sums are `sums` [out], to
// y [rows, out].
EXPORT void eft_int8_products(const int8_t* x, long rows, long in, const int8_t* values, long stride,
                              const int32_t* sums, long out, int32_t* y, int threads) {
    static thread_local Scratch scratch;
    const long width = (in + BYTES - 1) / BYTES * BYTES;
    int8_t* shifted = reinterpret_cast<int8_t*>(scratch.bytes(static_cast<size_t>(rows * width)));
    for (long row = 0; row < rows; row++) {
        for (long k = 0; k < in; k++) shifted[row * width + k] = static_cast<int8_t>(x[row * in + k] ^ SHIFT);
        std::memset(shifted + row * width + in, 0, static_cast<size_t>(width - in));
    }
    const long outputs = (out + SHARE - 1) / SHARE, blocks = (rows + SHARE - 1) / SHARE;
    for_each(threads, outputs * blocks, [&](long task) {
        const long begin = task % blocks * SHARE, stop = std::min(rows, begin + SHARE);
        const long first = task / blocks * SHARE, end = std::min(out, first + SHARE);
        for (long n = first; n < end; n += OUTPUTS) {
            const int8_t* weights[OUTPUTS];
            int32_t offsets[OUTPUTS];
            for (int i = 0; i < OUTPUTS; i++) {
                const long output = std::min(n + i, end - 1);
                weights[i] = values + output * stride;
                offsets[i] = static_cast<int32_t>(SHIFT) * sums[output];
            }
            const bool whole = std::min(n + OUTPUTS, end) * stride + width <= out * stride + in;
            for (long row = begin; row < stop; row += ROWS) {
                const int8_t* some[ROWS];
                for (int r = 0; r < ROWS; r++) some[r] = shifted + std::min(row + r, stop - 1) * width;
                int32_t found[W];
                const vi all = products(some, weights, in, whole);
                std::memcpy(found, &all, sizeof found);
                for (int r = 0; r < ROWS && row + r < stop; r++) {
                    int32_t* to = y + (row + r) * out + n;
                    if (n + OUTPUTS <= end)
                        for (int i = 0; i < OUTPUTS; i++) to[i] = found[r * OUTPUTS + i] + offsets[i];
                    else
                        for (int i = 0; n + i < end; i++) to[i] = found[r * OUTPUTS + i] + offsets[i];
                }
            }
        }
    });
}
