// Products of rows of bytes with weights in bytes as they lie, [out][in]: for weights of which a rank holds some
// inputs.
//
// Sums are of integers and exact, in any order.
#include <algorithm>

#include "exports.h"
#include "scratch.h"
#include "simd.h"
#include "threading.h"

namespace {

constexpr long VECTOR_BYTES = 4 * W;
// Outputs and rows that are multiplied at once: as many sums as a vector has lanes.
constexpr int OUTPUTS_PER_TILE = 4, ROWS_PER_TILE = W / OUTPUTS_PER_TILE;
// Outputs of one task, and rows that they are multiplied with before the next ones: both stay in the cache.
constexpr long TASK_ROWS = 64;

// Bits that are flipped in the rows' bytes, which adds 128: VNNI takes them from 0 to 255. Subtracted again at the end.
#if defined(__AVX512VNNI__)
constexpr int8_t ZERO_POINT = -128;
#else
constexpr int8_t ZERO_POINT = 0;
#endif

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

INLINE vi load_bytes(const int8_t* from, long count = VECTOR_BYTES) {
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

// ROWS_PER_TILE rows times OUTPUTS_PER_TILE outputs: lane r * OUTPUTS_PER_TILE + n is row r's output n. `whole`: memory
// goes on up to a whole vector beyond every output's own bytes; those are multiplied with zeros.
INLINE vi products(const int8_t* const (&x)[ROWS_PER_TILE], const int8_t* const (&w)[OUTPUTS_PER_TILE], long in,
                   bool whole) {
    vi lanes[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) lanes[i] = vi{};
    const auto step = [&](long k, long count) INLINE_LAMBDA {
        vi weights[OUTPUTS_PER_TILE];
#pragma GCC unroll 4
        for (int n = 0; n < OUTPUTS_PER_TILE; n++) weights[n] = load_bytes(w[n] + k, count);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_PER_TILE; r++) {
            const vi bytes = load_bytes(x[r] + k);
#pragma GCC unroll 4
            for (int n = 0; n < OUTPUTS_PER_TILE; n++)
                lanes[r * OUTPUTS_PER_TILE + n] = add_products(lanes[r * OUTPUTS_PER_TILE + n], bytes, weights[n]);
        }
    };
    long k = 0;
    for (; k + VECTOR_BYTES <= in; k += VECTOR_BYTES) step(k, VECTOR_BYTES);
    if (k < in && whole)
        step(k, VECTOR_BYTES);
    else if (k < in)
        step(k, in - k);
    return sums_of(lanes);
}

}  // namespace

void eft_int8_matmul(const int8_t* x, long rows, long in, const int8_t* values, long stride,
                              const int32_t* sums, long out, int32_t* y, int threads) {
    static thread_local Scratch scratch;
    const long width = (in + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
    int8_t* shifted = reinterpret_cast<int8_t*>(scratch.bytes(static_cast<size_t>(rows * width)));
    for (long row = 0; row < rows; row++) {
        for (long k = 0; k < in; k++) shifted[row * width + k] = static_cast<int8_t>(x[row * in + k] ^ ZERO_POINT);
        std::memset(shifted + row * width + in, 0, static_cast<size_t>(width - in));
    }
    const long outputs = (out + TASK_ROWS - 1) / TASK_ROWS, blocks = (rows + TASK_ROWS - 1) / TASK_ROWS;
    parallel_for(threads, outputs * blocks, [&](long task) {
        const long begin = task % blocks * TASK_ROWS, stop = std::min(rows, begin + TASK_ROWS);
        const long first = task / blocks * TASK_ROWS, end = std::min(out, first + TASK_ROWS);
        for (long n = first; n < end; n += OUTPUTS_PER_TILE) {
            const int8_t* weights[OUTPUTS_PER_TILE];
            int32_t offsets[OUTPUTS_PER_TILE];
            for (int i = 0; i < OUTPUTS_PER_TILE; i++) {
                const long output = std::min(n + i, end - 1);
                weights[i] = values + output * stride;
                offsets[i] = static_cast<int32_t>(ZERO_POINT) * sums[output];
            }
            const bool whole = std::min(n + OUTPUTS_PER_TILE, end) * stride + width <= out * stride + in;
            for (long row = begin; row < stop; row += ROWS_PER_TILE) {
                const int8_t* some[ROWS_PER_TILE];
                for (int r = 0; r < ROWS_PER_TILE; r++) some[r] = shifted + std::min(row + r, stop - 1) * width;
                int32_t found[W];
                const vi all = products(some, weights, in, whole);
                std::memcpy(found, &all, sizeof found);
                for (int r = 0; r < ROWS_PER_TILE && row + r < stop; r++) {
                    int32_t* to = y + (row + r) * out + n;
                    if (n + OUTPUTS_PER_TILE <= end)
                        for (int i = 0; i < OUTPUTS_PER_TILE; i++) to[i] = found[r * OUTPUTS_PER_TILE + i] + offsets[i];
                    else
                        for (int i = 0; n + i < end; i++) to[i] = found[r * OUTPUTS_PER_TILE + i] + offsets[i];
                }
            }
        }
    });
}
