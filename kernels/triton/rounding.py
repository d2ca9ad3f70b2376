"""Rounding to whole numbers as torch rounds."""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)


@triton.jit
def nearest(x):
    """The nearest whole number of x, the even one of two, for sizes below 2^22: beyond 1.5 * 2^23 float32 has no
    fractions. Launch with `enable_fp_fusion=False`: a product before this must be rounded first."""
    return (x + MAGIC) - MAGIC
