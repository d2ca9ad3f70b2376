// Calling a linear that is known by its address: their arguments differ in how many tensors a weight is.
#pragma once

// What a linear does beside the product; see `Linear` in `linear.h`.
struct Around {
    const float* norm = nullptr;
    float eps = 0.0f;
    const float* residual = nullptr;
    int swiglu = 0;
};

// y [rows, out] = x [rows, in] times a weight of `count` tensors, 1 to 3.
inline void call_linear(void* op, const float* x, long rows, long in, long out, const void* const* tensors, long count,
                        const float* bias, const Around& around, float* y, int threads) {
    using One = void (*)(const float*, long, long, long, long, const void*, const float*, const float*, float,
                         const float*, float*, int, int);
    using Two = void (*)(const float*, long, long, long, long, const void*, const void*, const float*, const float*,
                         float, const float*, float*, int, int);
    using Three = void (*)(const float*, long, long, long, long, const void*, const void*, const void*, const float*,
                           const float*, float, const float*, float*, int, int);
    const void* const* t = tensors;
    switch (count) {
        case 1:
            return reinterpret_cast<One>(op)(x, in, rows, in, out, t[0], bias, around.norm, around.eps, around.residual,
                                             y, around.swiglu, threads);
        case 2:
            return reinterpret_cast<Two>(op)(x, in, rows, in, out, t[0], t[1], bias, around.norm, around.eps,
                                             around.residual, y, around.swiglu, threads);
        case 3:
            return reinterpret_cast<Three>(op)(x, in, rows, in, out, t[0], t[1], t[2], bias, around.norm, around.eps,
                                               around.residual, y, around.swiglu, threads);
    }
}
