// From logits to tokens, row by row.
#include <algorithm>

#include "exports.h"
#include "threading.h"
#include "token_weights.h"

namespace {

// Tokens in the order of their logits, from the largest on, equal ones by their ids, without sorting them all.
//
// They lie in buckets, each of a range of weights, and a bucket is sorted only when something ends within it. Sums are
// in float64: a bucket's in the order of ids, or once it is cut in the order of the tokens; over buckets from the
// first.
class TokenBuckets {
   public:
    // The tokens of a row whose weight is at least `least`, above 0.
    TokenBuckets(const float* logits, const TokenWeights& weights, float most, float temperature, float least,
                 Scratch& scratch)
        : weights_(weights) {
        const size_t size = static_cast<size_t>(weights.size);
        Entry* entries = reinterpret_cast<Entry*>(scratch.bytes(size * (sizeof(Entry) + sizeof(uint64_t))));
        keys_ = reinterpret_cast<uint64_t*>(entries + size);
        long count = 0;
        const float inverse = std::min(1.0f / temperature, 3.4e38f);
        for (long run = 0; run < weights.runs; run++) {
            if (weights.top(run) < least) continue;
            const long end = std::min((run + 1) * RUN_TOKENS, weights.size);
            for (long token = run * RUN_TOKENS; token < end; token++) {
                if (weights[token] < least) continue;
                const float distance = (most - logits[token]) * inverse;
                const int bucket = std::min(static_cast<int>(distance * BUCKETS_PER_NAT), NUM_BUCKETS - 1);
                entries[count++] = {key(logits[token], token), bucket};
                ends_[bucket]++;
                masses_[bucket] += static_cast<double>(weights[token]);
            }
        }
        int32_t start = 0;
        for (int bucket = 0; bucket < NUM_BUCKETS; bucket++) {
            const int32_t here = ends_[bucket];
            starts_[bucket] = ends_[bucket] = start;
            start += here;
        }
        for (long i = 0; i < count; i++) keys_[ends_[entries[i].bucket]++] = entries[i].key;
    }

    // Keeps the first `count` tokens.
    void keep(long count) {
        for (int bucket = 0; bucket <= last_; bucket++) {
            const long here = ends_[bucket] - starts_[bucket];
            if (here >= count) return cut(bucket, count);
            count -= here;
        }
    }

    // Keeps the first tokens that weigh at least `mass` together, and one in any case.
    void keep_mass(double mass) {
        double before = 0.0;
        for (int bucket = 0; bucket <= last_; bucket++) {
            if (before + masses_[bucket] < mass) {
                before += masses_[bucket];
                continue;
            }
            sort(bucket);
            int32_t end = starts_[bucket];
            do before += weight(end++);
            while (end < ends_[bucket] && before < mass);
            return cut(bucket, end - starts_[bucket]);
        }
    }

    // Sum of the weights of all kept tokens.
    double mass() const {
        double total = 0.0;
        for (int bucket = 0; bucket <= last_; bucket++) total += masses_[bucket];
        return total;
    }

    // The token at which the sum of weights passes `point`, or else the last one.
    long at(double point) {
        double before = 0.0;
        int found = 0;
        for (int bucket = 0; bucket <= last_; bucket++) {
            if (starts_[bucket] == ends_[bucket]) continue;
            found = bucket;
            if (before + masses_[bucket] > point) break;
            before += masses_[bucket];
        }
        sort(found);
        int32_t i = starts_[found];
        while (i < ends_[found] - 1 && (before += weight(i)) <= point) i++;
        return token(i);
    }

   private:
    static constexpr int NUM_BUCKETS = 2048;
    // NUM_BUCKETS over the 88 nats from the largest weight to the smallest.
    static constexpr float BUCKETS_PER_NAT = 23.0f;

    struct Entry {
        uint64_t key;
        int bucket;
    };

    // Ascending as logits fall, and then as ids rise.
    static uint64_t key(float logit, long token) {
        uint32_t bits;
        logit += 0.0f;  // makes 0 of -0
        std::memcpy(&bits, &logit, sizeof bits);
        const uint32_t falling = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
        return static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(token);
    }

    long token(int32_t i) const { return static_cast<long>(keys_[i] & 0xffffffffu); }
    double weight(int32_t i) const { return static_cast<double>(weights_[token(i)]); }
    void sort(int bucket) { std::sort(keys_ + starts_[bucket], keys_ + ends_[bucket]); }

    // Keeps the first `count` tokens of a bucket, and of those after it none.
    void cut(int bucket, long count) {
        sort(bucket);
        last_ = bucket;
        ends_[bucket] = starts_[bucket] + static_cast<int32_t>(count);
        masses_[bucket] = 0.0;
        for (int32_t i = starts_[bucket]; i < ends_[bucket]; i++) masses_[bucket] += weight(i);
    }

    const TokenWeights& weights_;
    uint64_t* keys_;
    int last_ = NUM_BUCKETS - 1;
    int32_t starts_[NUM_BUCKETS], ends_[NUM_BUCKETS] = {};
    double masses_[NUM_BUCKETS] = {};
};

// Factor for thresholds of weights: a larger logit can have a weight that is smaller by the error of exp.
constexpr float EXP_ERROR_SLACK = 1.0f - 1e-6f;

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
    if (filters.top_k < size) least = std::max(least, weights.threshold_of(filters.top_k) * EXP_ERROR_SLACK);
    if (!limited)
        least = std::max(least, static_cast<float>((1.0 - static_cast<double>(filters.top_p)) * weights.total /
                                                   static_cast<double>(size)) *
                                    EXP_ERROR_SLACK);
    TokenBuckets buckets(logits, weights, most, filters.temperature, least, more);
    if (filters.top_k < size) buckets.keep(filters.top_k);
    if (filters.top_p < 1.0f)
        buckets.keep_mass(static_cast<double>(filters.top_p) * (limited ? buckets.mass() : weights.total));
    return buckets.at(uniform * buckets.mass());
}

}  // namespace

void eft_sample(const float* logits, long stride, long rows, long size, const double* uniform,
                       const float* temperature, const int64_t* top_k, const float* top_p, const float* min_p,
                       int64_t* tokens, int threads) {
    parallel_for(threads, rows, [&](long row) {
        tokens[row] = sample_row(logits + row * stride, size, uniform[row],
                                 {temperature[row], top_k[row], top_p[row], min_p[row]});
    });
}
