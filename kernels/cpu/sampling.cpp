// From logits to tokens, row by row.
#include "buckets.h"
#include "export.h"
#include "parallel.h"
#include "sampling.h"

namespace {

constexpr float SLACK = 1.0f - 1e-6f;
// A larger logit can have a weight that is smaller by the error of exp.

struct Filters {
    float temperature;
    long top_k;   // or the size of the vocabulary
    float top_p;  // or 1
    float min_p;  // or 0
};

// The first NaN, or the first of the largest logits.
long first_of_largest(const float* logits, long size, float most) {
    for (long i = 0; i < size; i++)
        if (logits[i] == most || (most != most && logits[i] != logits[i])) return i;
    return 0;
}

long sample_row(const float* logits, long size, double uniform, const Filters& filters) {
    static thread_local Scratch space, more;
    const float most = largest_logit(logits, size);
    if (!std::isfinite(most)) return first_of_largest(logits, size, most);
    const TokenWeights weights(logits, size, most, filters.temperature, space);
    const bool limited = filters.top_k < size || filters.min_p > 0.0f;
    if (!limited && filters.top_p >= 1.0f) return weights.at(uniform * weights.total);

    // Nothing that weighs less can be kept: so few tokens are looked at.
    float least = std::max(filters.min_p, 1e-38f);
    if (filters.top_k < size) least = std::max(least, weights.reached_by(filters.top_k) * SLACK);
    if (!limited)
        least = std::max(least, static_cast<float>((1.0 - static_cast<double>(filters.top_p)) * weights.total /
                                                   static_cast<double>(size)) * SLACK);
    Buckets buckets(logits, weights, most, filters.temperature, least, more);
    if (filters.top_k < size) buckets.keep(filters.top_k);
    if (filters.top_p < 1.0f)
        buckets.keep_mass(static_cast<double>(filters.top_p) * (limited ? buckets.mass() : weights.total));
    return buckets.at(uniform * buckets.mass());
}

}  // namespace

// A token of each row of logits [rows, size], `stride` floats apart, where its distribution function passes uniform
// [rows]; see `Ops.sample` for the filters, each [rows].
EXPORT void eft_sample(const float* logits, long stride, long rows, long size, const double* uniform,
                       const float* temperature, const int64_t* top_k, const float* top_p, const float* min_p,
                       int64_t* tokens, int threads) {
    for_each(threads, rows, [&](long row) {
        tokens[row] = sample_row(logits + row * stride, size, uniform[row],
                                 {temperature[row], top_k[row], top_p[row], min_p[row]});
    });
}
