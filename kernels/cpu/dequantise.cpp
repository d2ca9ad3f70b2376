// Weights in four-bit NormalFloat as the floats that they stand for, each the product of a code and a scale.
#include <algorithm>

#include "export.h"
#include "nf4.h"
#include "parallel.h"

// Weights as for `eft_linear_nf4` to y [out, in].
EXPORT void eft_dequantise_nf4(const uint8_t* values, const float* scales, long out, long in, float* y, int threads) {
    const Nf4Tiles weight{values, scales, (in + NF4_BLOCK - 1) / NF4_BLOCK};
    for_each(threads, (out + W - 1) / W, [&](long unit) {
        const CodeTable table;
        const long rows = std::min<long>(W, out - unit * W);
        float* to = y + unit * W * in;
        for (long block = 0; block < weight.blocks; block++) {
            const vf scale = weight.scales_of(unit, block);
            const long most = std::min<long>(NF4_BLOCK, in - block * NF4_BLOCK);
            for (long first = 0; first < most; first += W) {
                // A vector is one input of W outputs, and is to be W inputs of one output.
                vf inputs[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    const int k = static_cast<int>(first) + i;
                    inputs[i] = table.look_up(weight.line(unit, block, k / 8), k % 8) * scale;
                }
                transpose(inputs);
                const size_t bytes = static_cast<size_t>(std::min<long>(W, most - first)) * sizeof(float);
                for (long row = 0; row < rows; row++)
                    std::memcpy(to + row * in + block * NF4_BLOCK + first, &inputs[row], bytes);
            }
        }
    });
}
