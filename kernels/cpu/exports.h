// The ops that other ops call.
#pragma once

#include <cstdint>

#include "export.h"

EXPORT void eft_rms_norm(const float* x, long stride, long rows, long size, const float* weight, float one, float eps,
                         float* y, int threads);
EXPORT void eft_silu_mul(const float* x, long rows, long inner, float* y, int threads);
EXPORT void eft_rope_and_cache(float* q, long q_stride, float* k, long k_stride, const float* v, long v_stride,
                               const float* cos, const float* sin, long half, char* keys, char* values,
                               const int64_t* slots, long tokens, long heads, long kv_heads, long dim, int type,
                               int threads);
EXPORT void eft_paged_attention(const float* q, long q_stride, const char* keys, const char* values,
                                const int64_t* tables, long width, const int64_t* extents, long rows, long heads,
                                long kv_heads, long dim, long block_size, float scale, long window, float softcap,
                                float* out, int type, int threads);
EXPORT void eft_lora_apply(const float* x, long x_stride, long in, float* y, long y_stride, const void* table,
                           long segments, int threads);
