// Products of signed bytes, four at a time in each 32-bit lane, summed exactly.
//
// VNNI multiplies unsigned with signed bytes, so activations are stored plus 128 there, and 128 times the sum of the
// weights is taken off again at the end. The older instruction adds pairs in 16 bits: there weights lend their signs
// to the activations. All bytes are from -127 to 127.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Added to the bytes of activations, because VNNI takes them without a sign.
#if defined(__AVX512VNNI__)
constexpr int32_t VNNI_ZERO_POINT = 128;
#else
constexpr int32_t VNNI_ZERO_POINT = 0;
#endif

#if defined(__AVX512F__)
INLINE vi multiply_pairs(vi w, vi x) { return (vi)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)a, (__m512i)b); }
INLINE vi sum_pairs(vi a) { return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__)
INLINE vi multiply_pairs(vi w, vi x) { return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
INLINE vi sum_pairs(vi a) { return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
#endif

// Four weights of every lane, as many rows are multiplied with them.
struct Int8Quad {
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
    vi size;
    __mmask64 negative;

    INLINE explicit Int8Quad(vi w) : size((vi)_mm512_abs_epi8((__m512i)w)), negative(_mm512_movepi8_mask((__m512i)w)) {}
#elif defined(__AVX2__) && !defined(__AVX512F__)
    vi size, sign;

    INLINE explicit Int8Quad(vi w) : size((vi)_mm256_abs_epi8((__m256i)w)), sign(w) {}
#else
    vi values;

    INLINE explicit Int8Quad(vi w) : values(w) {}
#endif
};

// acc + the four products in each lane: x as stored, the same four in every lane.
INLINE vi dot_quad(vi acc, vi x, const Int8Quad& w) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w.values);
#elif defined(__AVX512F__)
    const __m512i v = (__m512i)x;
    return acc + sum_pairs(multiply_pairs(w.size, (vi)_mm512_mask_sub_epi8(v, w.negative, _mm512_setzero_si512(), v)));
#elif defined(__AVX2__)
    return acc + sum_pairs(multiply_pairs(w.size, (vi)_mm256_sign_epi8((__m256i)x, (__m256i)w.sign)));
#else
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) acc += ((x << (24 - 8 * byte)) >> 24) * ((w.values << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

// Four bytes in every lane.
INLINE vi broadcast_quad(const int8_t* bytes) {
    int32_t lane;
    std::memcpy(&lane, bytes, sizeof lane);
    return splat(lane);
}

// Four bytes each of W outputs.
INLINE vi load_line(const int8_t* from) {
    vi v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// `ZeroPointWeights` hold `LINES_PER_DOT` lines of 64 bytes of int8 tiles (`tile_gemm.h`), W outputs of them.
// `dot_zero_point` adds their products with x, four bytes for each line, which are stored plus `ZERO_POINT`. A row of
// zeros does not give 0: what it gives (zero_sums in `exports.h`) is subtracted at the end.
#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int LINES_PER_DOT = 2;

// Narrow weights (`quantise_narrow_int8` in `kernels/quantised.py`) as they are: four of them times bytes up to 255 fit
// in 16 bits.
template <bool NARROW>
struct ZeroPointWeights {
    static constexpr int32_t ZERO_POINT = 128;

    vi values[LINES_PER_DOT];

    INLINE explicit ZeroPointWeights(const int8_t* lines) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES_PER_DOT; i++) values[i] = opaque(load_line(lines + i * 64));
    }

    INLINE vi pairs_with(int i, vi x) const { return multiply_pairs(x, values[i]); }
};

// Others lend their signs to the activations. The complement of a byte is one less than its negative, and can be had in
// more of the processor's ports. It is up to 128 in size: times weights whose sizes are 256 together (`reach_of`), it
// just fits.
template <>
struct ZeroPointWeights<false> {
    static constexpr int32_t ZERO_POINT = 0;

    vi sizes[LINES_PER_DOT], flips[LINES_PER_DOT];

    INLINE explicit ZeroPointWeights(const int8_t* lines) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES_PER_DOT; i++) {
            const vi w = load_line(lines + i * 64);
#if defined(__AVX512F__)
            sizes[i] = (vi)_mm512_abs_epi8((__m512i)w);
            flips[i] = (vi)_mm512_movm_epi8(_mm512_movepi8_mask((__m512i)w));
#else
            sizes[i] = (vi)_mm256_abs_epi8((__m256i)w);
            flips[i] = (vi)_mm256_cmpgt_epi8(_mm256_setzero_si256(), (__m256i)w);
#endif
        }
    }

    INLINE vi pairs_with(int i, vi x) const { return multiply_pairs(sizes[i], x ^ flips[i]); }
};

template <bool NARROW>
INLINE vi dot_zero_point(vi acc, const int8_t* x, const ZeroPointWeights<NARROW>& w) {
    // Else GCC adds up the products of a group first, for which registers do not suffice.
    return opaque(acc +
                  sum_pairs(add_pairs(w.pairs_with(0, broadcast_quad(x)), w.pairs_with(1, broadcast_quad(x + 4)))));
}
#else
constexpr int LINES_PER_DOT = 1;

template <bool NARROW>
struct ZeroPointWeights {
#if defined(__AVXVNNI__)
    static constexpr int32_t ZERO_POINT = 128;
#else
    static constexpr int32_t ZERO_POINT = VNNI_ZERO_POINT;
#endif

    Int8Quad weights;

    INLINE explicit ZeroPointWeights(const int8_t* line) : weights(load_line(line)) {}
};

template <bool NARROW>
INLINE vi dot_zero_point(vi acc, const int8_t* x, const ZeroPointWeights<NARROW>& w) {
#if defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)broadcast_quad(x), (__m256i)w.weights.sign);
#else
    return dot_quad(acc, broadcast_quad(x), w.weights);
#endif
}
#endif

INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

using vb = int8_t __attribute__((vector_size(W)));

// The low byte of each.
INLINE void store_bytes(vi integers, int8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // GCC would take them one by one.
    const __m256i low = _mm256_set1_epi32(0x0c080400);
    const __m256i picked = _mm256_shuffle_epi8((__m256i)integers, low);  // four of each half
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
    std::memcpy(to, &both, W);
#else
    const vb narrow = __builtin_convertvector(integers, vb);
    std::memcpy(to, &narrow, sizeof narrow);
#endif
}

// x to the nearest integer, halves to even; below 2^22 in size.
INLINE vi rounded(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    // Not fused with the product that x is: that would round once instead of twice, and not as the reference does.
    x = opaque(x);
    const vf magic = splat(12582912.0f);
    return bits(x + magic) - bits(magic);
#endif
}

// Inputs with a scale of their own, in formats with groups.
constexpr int GROUP = 32;
// Lanes of 32 bits that hold four bytes of a group each.
constexpr int QUADS_PER_GROUP = GROUP / 4;

struct GroupQuads {
    vi quads[QUADS_PER_GROUP];  // inputs 4 i to 4 i + 3 of W outputs
};

using Int8Group = int8_t[GROUP];
// A group of one row's activations, from -127 to 127.

#if defined(__AVX512VNNI__)
#define HAS_VNNI
// acc + the four products in each lane, of weights from 0 to 255.
INLINE vi dot_unsigned_quad(vi acc, vi w, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
#elif defined(__AVXVNNI__)
#define HAS_VNNI
INLINE vi dot_unsigned_quad(vi acc, vi w, vi x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
}
#endif

// Without VNNI: total[r] += weights from 0 to 15 times activations.
template <int R>
INLINE void add_unsigned(const GroupQuads& w, const Int8Group* rows, vi (&total)[R]) {
#if defined(__AVX2__)
    // Pairs are at most 2 * 15 * 127, so eight of them fit in 16 bits. Half of the weights at a time, else registers do
    // not suffice for them and the sums.
    vi sum[R];
#pragma GCC unroll 2
    for (int half = 0; half < QUADS_PER_GROUP; half += QUADS_PER_GROUP / 2) {
        vi some[QUADS_PER_GROUP / 2];
#pragma GCC unroll 4
        for (int i = 0; i < QUADS_PER_GROUP / 2; i++) some[i] = opaque(w.quads[half + i]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const int8_t* x = rows[r] + 4 * half;
            vi products[QUADS_PER_GROUP / 2];
#pragma GCC unroll 4
            for (int i = 0; i < QUADS_PER_GROUP / 2; i++)
                products[i] = multiply_pairs(some[i], broadcast_quad(x + 4 * i));
            const vi found = add_pairs(add_pairs(products[0], products[1]), add_pairs(products[2], products[3]));
            sum[r] = opaque(half == 0 ? found : add_pairs(sum[r], found));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] += sum_pairs(sum[r]);
#else
    for (int i = 0; i < QUADS_PER_GROUP; i++)
        for (int r = 0; r < R; r++)
            total[r] = dot_quad(total[r], broadcast_quad(rows[r] + 4 * i), Int8Quad(w.quads[i]));
#endif
}

// The same with weights from -127 to 127.
template <int R>
INLINE void add_signed(const GroupQuads& w, const Int8Group* rows, vi (&total)[R]) {
#pragma GCC unroll 8
    for (int i = 0; i < QUADS_PER_GROUP; i++) {
        const Int8Quad weights(w.quads[i]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) total[r] = dot_quad(total[r], broadcast_quad(rows[r] + 4 * i), weights);
    }
}
