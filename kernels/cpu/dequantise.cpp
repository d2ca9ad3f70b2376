// Weights as the floats that they stand for.
#include <algorithm>

#include "exports.h"
#include "int8_dot.h"
#include "nf4_weights.h"
#include "row_transforms.h"
#include "threading.h"

void eft_dequantise_nf4(const uint8_t* values, const float* scales, long out, long in, float* y, int threads) {
    const Nf4Tiles weight{values, scales, (in + NF4_BLOCK - 1) / NF4_BLOCK};
    parallel_for(threads, (out + W - 1) / W, [&](long unit) {
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

void eft_int8_rows(const int8_t* values, const float* scales, long in, const int64_t* index, long count, float* y,
                          int threads) {
    constexpr long OUTPUTS = 16, LINES = HADAMARD_SIZE / 4;  // of a tile; of a block of 64 inputs, which are two groups
    const long blocks = (in + HADAMARD_SIZE - 1) / HADAMARD_SIZE;
    parallel_for(threads, count, [&](long i) {
        const long row = index[i];
        const int8_t* from = values + row / OUTPUTS * blocks * LINES * OUTPUTS * 4 + row % OUTPUTS * 4;
        const vf scale = splat(scales[row]);
        for (long first = 0; first < in; first += HADAMARD_SIZE, from += LINES * OUTPUTS * 4) {
            alignas(64) int8_t bytes[HADAMARD_SIZE];
            for (long line = 0; line < LINES; line++) std::memcpy(bytes + line * 4, from + line * OUTPUTS * 4, 4);
            vf v[HADAMARD_VECTORS];
#pragma GCC unroll 16
            for (int k = 0; k < HADAMARD_VECTORS; k++) {
                vb some;
                std::memcpy(&some, bytes + k * W, sizeof some);
                // Rounded before it is added to others, as it is where all are dequantised.
                v[k] = opaque(to_float(__builtin_convertvector(some, vi)) * scale);
            }
            hadamard(v);
            alignas(64) float rotated[HADAMARD_SIZE];
#pragma GCC unroll 16
            for (int k = 0; k < HADAMARD_VECTORS; k++) store(rotated + k * W, v[k] * splat(HADAMARD_SCALE));
            const long most = std::min<long>(HADAMARD_SIZE, in - first);
            std::memcpy(y + i * in + first, rotated, static_cast<size_t>(most) * sizeof(float));
        }
    });
}

void eft_int8_factor(const int8_t* values, const float* scales, long out, long width, float* y, int threads) {
    constexpr long OUTPUTS = 16, INPUTS = 4;  // of a line; a vector holds W pieces of as many inputs
    parallel_for(threads, (out + OUTPUTS - 1) / OUTPUTS, [&](long tile) {
        const int8_t* from = values + tile * OUTPUTS * width;
        const long rows = std::min(OUTPUTS, out - tile * OUTPUTS);
        for (long first = 0; first < width; first += W * INPUTS, from += W * OUTPUTS * INPUTS)
            for (long output = 0; output < rows; output += W) {
                vf pieces[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) std::memcpy(&pieces[i], from + (i * OUTPUTS + output) * INPUTS, sizeof(vf));
                transpose(pieces);
                for (long row = output; row < std::min(output + W, rows); row++) {
                    int8_t bytes[W * INPUTS];
                    std::memcpy(bytes, &pieces[row - output], sizeof bytes);
                    const vf scale = splat(scales[tile * OUTPUTS + row]);
                    float* to = y + (tile * OUTPUTS + row) * width + first;
#pragma GCC unroll 4
                    for (int k = 0; k < INPUTS; k++) {
                        vb some;
                        std::memcpy(&some, bytes + k * W, sizeof some);
                        store(to + k * W, to_float(__builtin_convertvector(some, vi)) * scale);
                    }
                }
            }
    });
}

void eft_hadamard(const float* x, long stride, long rows, long in, float* y, long out, int threads) {
    constexpr long TASK_ROWS = 8;  // enough work to be worth its claim
    parallel_for(threads, (rows + TASK_ROWS - 1) / TASK_ROWS, [&](long task) {
        for (long row = task * TASK_ROWS; row < std::min(rows, (task + 1) * TASK_ROWS); row++)
            for (long first = 0; first < out; first += HADAMARD_SIZE) {
                alignas(64) float block[HADAMARD_SIZE] = {};
                const long given = std::clamp<long>(in - first, 0, HADAMARD_SIZE);
                std::memcpy(block, x + row * stride + first, static_cast<size_t>(given) * sizeof(float));
                vf v[HADAMARD_VECTORS];
#pragma GCC unroll 16
                for (int k = 0; k < HADAMARD_VECTORS; k++) v[k] = load(block + k * W);
                hadamard(v);
#pragma GCC unroll 16
                for (int k = 0; k < HADAMARD_VECTORS; k++) store(block + k * W, v[k] * splat(HADAMARD_SCALE));
                const long most = std::min<long>(HADAMARD_SIZE, out - first);
                std::memcpy(y + row * out + first, block, static_cast<size_t>(most) * sizeof(float));
            }
    });
}
