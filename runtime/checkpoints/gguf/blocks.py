"""The block formats of GGML, turned back into float32.

A quantised row is a sequence of blocks, each holding 32 or 256 values as small integers and the scales to
multiply them with. Formats as in ggml-common.h and ggml-quants.c (`dequantize_row_*`) of llama.cpp. Every
function here takes blocks as bytes, uint8 [blocks, bytes of a block], and writes float32 [blocks, values].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

VALUES_AT_ONCE = 1 << 18
"""Values converted in one go: their intermediate arrays stay in the processor's cache."""


@dataclass(frozen=True)
class BlockFormat:
    """One GGML tensor type."""

    name: str
    values: int
    """In one block."""
    size: int
    """Bytes of one block."""
    convert: Callable[[Bytes, Floats], None]

    def num_bytes(self, num_values: int) -> int:
        """Bytes that `num_values` take; they must be whole blocks."""
        return num_values // self.values * self.size


def dequantise(format: BlockFormat, data: Bytes) -> Floats:
    """The values of `data`, uint8 [n * format.size], as float32 [n * format.values]."""
    blocks = data.reshape(-1, format.size)
    out = np.empty((len(blocks), format.values), dtype=np.float32)
    rows = max(1, VALUES_AT_ONCE // format.values)
    for start in range(0, len(blocks), rows):
        format.convert(blocks[start : start + rows], out[start : start + rows])
    return out.reshape(-1)


def _scale(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = np.ascontiguousarray(blocks).view(np.float16)


def _bf16(blocks: Bytes, out: Floats) -> None:
    """A bfloat16 is the upper half of a float32."""
    np.left_shift(np.ascontiguousarray(blocks).view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """d: f16, q: 16 bytes. The low halves are the first 16 values, the high halves the rest: d * (q - 8)."""
    _nibbles(blocks[:, 2:], out)
    out -= 8.0
    out *= _scale(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """d: f16, m: f16, q: 16 bytes, halves as in Q4_0: d * q + m."""
    _nibbles(blocks[:, 4:], out)
    out *= _scale(blocks, 0)
    out += _scale(blocks, 2)


def _nibbles(packed: Bytes, out: Floats) -> None:
    half = packed.shape[1]
    np.bitwise_and(packed, 15, out=out[:, :half], casting="unsafe")
    np.right_shift(packed, 4, out=out[:, half:], casting="unsafe")


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """d: f16, q: 32 int8: d * q."""
    np.multiply(blocks[:, 2:].view(np.int8), _scale(blocks, 0), out=out)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """d: f16, dmin: f16, 12 bytes with 8 scales and 8 minima of 6 bits, q: 128 bytes.

    Of each 32 bytes of q the low halves are one run of 32 values and the high halves the next:
    d * scale * q - dmin * minimum.
    """
    packed = blocks[:, 4:16]
    low, high, top = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (top & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([high & 63, (top >> 4) | ((high >> 6) << 4)], axis=1)
    q = blocks[:, 16:].reshape(-1, 4, 1, 32)
    runs = out.reshape(-1, 8, 32)
    pairs = runs.reshape(-1, 4, 2, 32)
    np.bitwise_and(q[:, :, 0], 15, out=pairs[:, :, 0], casting="unsafe")
    np.right_shift(q[:, :, 0], 4, out=pairs[:, :, 1], casting="unsafe")
    runs *= (scales * _scale(blocks, 0))[:, :, None]
    runs -= (minima * _scale(blocks, 2))[:, :, None]


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """Low 4 bits: 128 bytes, high 2 bits: 64 bytes, 16 int8 scales, d: f16: d * scale * (q - 32).

    Each half of the block, 128 values, has 64 bytes of low bits (first the low halves of bytes 0 to 63,
    then their high halves) and 32 bytes of high bits (bits 0-1 for the first 32 values, then 2-3, 4-5, 6-7).
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    runs = out.reshape(-1, 2, 4, 32)
    runs[:] = low | (((high >> shifts) & 3) << 4)
    out -= 32.0
    scales = blocks[:, 192:208].view(np.int8) * _scale(blocks, 208)
    by_scale = out.reshape(-1, 16, 16)
    by_scale *= scales[:, :, None]


FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bf16),
}
"""By GGML's number of the type."""

_OTHERS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(type: int) -> str:
    """GGML's name of a type, for messages."""
    return FORMATS[type].name if type in FORMATS else _OTHERS.get(type, f"type {type}")
