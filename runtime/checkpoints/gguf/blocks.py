"""Conversion of GGML's block formats to float32.

A quantised row is a sequence of blocks, each holding 32 or 256 values as small integers and the scales to
multiply them with. Formats as in ggml-common.h and ggml-quants.c (`dequantize_row_*`) of llama.cpp. Every
function here takes blocks as bytes, uint8 [blocks, bytes of a block], and writes float32 [blocks, values].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ByteArray = NDArray[np.uint8]
Floats = NDArray[np.float32]

VALUES_AT_ONCE = 1 << 18
"""Number of values converted together: their intermediate arrays stay in the processor's cache."""


TWO_BITS = np.array([0, 2, 4, 6], dtype=np.uint8)
"""Shifts to each of the four values of a byte."""
EIGHT_BITS = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)

NUMBERS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
"""The table of IQ4_NL and IQ4_XS (`kvalues_iq4nl`), dense near zero as weights are."""
LOW_NUMBERS, HIGH_NUMBERS = np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)
"""Byte → the table's value for its low half, and for its high half."""


@dataclass(frozen=True)
class BlockFormat:
    """One GGML tensor type."""

    name: str
    values: int
    """Number of values in one block."""
    size: int
    """Size of one block in bytes."""
    convert: Callable[[ByteArray, Floats], None]

    def num_bytes(self, num_values: int) -> int:
        """Size of `num_values` in bytes; they must be whole blocks."""
        return num_values // self.values * self.size


def dequantise(format: BlockFormat, data: ByteArray) -> Floats:
    """The values of `data`, uint8 [n * format.size], as float32 [n * format.values]."""
    blocks = data.reshape(-1, format.size)
    out = np.empty((len(blocks), format.values), dtype=np.float32)
    rows = max(1, VALUES_AT_ONCE // format.values)
    for start in range(0, len(blocks), rows):
        format.convert(blocks[start : start + rows], out[start : start + rows])
    return out.reshape(-1)


def _scale(blocks: ByteArray, at: int) -> Floats:
    """The float16 at byte `at` of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _f32(blocks: ByteArray, out: Floats) -> None:
    out[:] = np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: ByteArray, out: Floats) -> None:
    out[:] = np.ascontiguousarray(blocks).view(np.float16)


def _bf16(blocks: ByteArray, out: Floats) -> None:
    """bfloat16 values: each is the upper half of a float32."""
    np.left_shift(np.ascontiguousarray(blocks).view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: ByteArray, out: Floats) -> None:
    """d: f16, q: 16 bytes. The low halves are the first 16 values, the high halves the rest: d * (q - 8)."""
    _nibbles(blocks[:, 2:], out)
    out -= 8.0
    out *= _scale(blocks, 0)


def _q4_1(blocks: ByteArray, out: Floats) -> None:
    """d: f16, m: f16, q: 16 bytes, halves as in Q4_0: d * q + m."""
    _nibbles(blocks[:, 4:], out)
    out *= _scale(blocks, 0)
    out += _scale(blocks, 2)


def _nibbles(packed: ByteArray, out: Floats) -> None:
    half = packed.shape[1]
    np.bitwise_and(packed, 15, out=out[:, :half], casting="unsafe")
    np.right_shift(packed, 4, out=out[:, half:], casting="unsafe")


def _q5_0(blocks: ByteArray, out: Floats) -> None:
    """d: f16, fifth bits of the 32 values: 4 bytes, q: 16 bytes, halves as in Q4_0: d * (q - 16)."""
    out[:] = _five_bits(blocks[:, 6:], blocks[:, 2:6])
    out -= 16.0
    out *= _scale(blocks, 0)


def _q5_1(blocks: ByteArray, out: Floats) -> None:
    """d: f16, m: f16, fifth bits: 4 bytes, q: 16 bytes: d * q + m."""
    out[:] = _five_bits(blocks[:, 8:], blocks[:, 4:8])
    out *= _scale(blocks, 0)
    out += _scale(blocks, 2)


def _five_bits(packed: ByteArray, fifth: ByteArray) -> ByteArray:
    bits: ByteArray = np.unpackbits(fifth, axis=1, bitorder="little") << np.uint8(4)
    bits[:, :16] |= packed & 15
    bits[:, 16:] |= packed >> 4
    return bits


def _q8_0(blocks: ByteArray, out: Floats) -> None:
    """d: f16, q: 32 int8: d * q."""
    np.multiply(blocks[:, 2:].view(np.int8), _scale(blocks, 0), out=out)


def _q2_k(blocks: ByteArray, out: Floats) -> None:
    """16 bytes, each a scale of 4 bits and above it a minimum of 4 bits, q: 64 bytes, d: f16, dmin: f16.

    In each 32 bytes of q the lowest two bits are one run of 32 values, the next two the next, and so on. Scales and
    minima are for 16 values: d * scale * q - dmin * minimum.
    """
    out.reshape(-1, 2, 4, 32)[:] = _two_bits(blocks[:, 16:80])
    scales, by_scale = blocks[:, :16], out.reshape(-1, 16, 16)
    by_scale *= ((scales & 15) * _scale(blocks, 80))[:, :, None]
    by_scale -= ((scales >> 4) * _scale(blocks, 82))[:, :, None]


def _q3_k(blocks: ByteArray, out: Floats) -> None:
    """Third bits: 32 bytes, q: 64 bytes as in Q2_K, 12 bytes with 16 scales of 6 bits, d: f16.

    Bit n of byte i of the third bits is value i's of run n: d * (scale - 32) * (q - 4).
    """
    third = (blocks[:, :32].reshape(-1, 1, 32) >> EIGHT_BITS) & 1
    q = _two_bits(blocks[:, 32:96]).reshape(-1, 8, 32) | (third << 2)
    out.reshape(-1, 8, 32)[:] = q
    out -= 4.0
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = ((packed[:, 8:].reshape(-1, 1, 4) >> TWO_BITS.reshape(1, 4, 1)) & 3).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.int8) - 32
    by_scale = out.reshape(-1, 16, 16)
    by_scale *= (scales * _scale(blocks, 108))[:, :, None]


def _two_bits(packed: ByteArray) -> ByteArray:
    """64 bytes → [2, 4, 32] values a block."""
    values: ByteArray = (packed.reshape(-1, 2, 1, 32) >> TWO_BITS.reshape(1, 1, 4, 1)) & np.uint8(3)
    return values


def _q4_k(blocks: ByteArray, out: Floats) -> None:
    """d: f16, dmin: f16, 12 bytes with 8 scales and 8 minima of 6 bits, q: 128 bytes.

    In each 32 bytes of q the low halves are one run of 32 values and the high halves the next: d * scale * q - dmin *
    minimum.
    """
    q = blocks[:, 16:].reshape(-1, 4, 1, 32)
    pairs = out.reshape(-1, 4, 2, 32)
    np.bitwise_and(q[:, :, 0], 15, out=pairs[:, :, 0], casting="unsafe")
    np.right_shift(q[:, :, 0], 4, out=pairs[:, :, 1], casting="unsafe")
    _scale_runs(blocks, out)


def _q5_k(blocks: ByteArray, out: Floats) -> None:
    """As Q4_K, with the fifth bits in 32 bytes before q: bit n of byte i is value i's of run n."""
    fifth = (blocks[:, 16:48].reshape(-1, 1, 32) >> EIGHT_BITS) & 1
    pairs = (fifth << 4).reshape(-1, 4, 2, 32)
    q = blocks[:, 48:].reshape(-1, 4, 32)
    pairs[:, :, 0] |= q & 15
    pairs[:, :, 1] |= q >> 4
    out.reshape(-1, 4, 2, 32)[:] = pairs
    _scale_runs(blocks, out)


def _scale_runs(blocks: ByteArray, out: Floats) -> None:
    """Scales and minima of Q4_K and Q5_K."""
    packed = blocks[:, 4:16]
    low, high, top = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (top & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([high & 63, (top >> 4) | ((high >> 6) << 4)], axis=1)
    runs = out.reshape(-1, 8, 32)
    runs *= (scales * _scale(blocks, 0))[:, :, None]
    runs -= (minima * _scale(blocks, 2))[:, :, None]


def _q6_k(blocks: ByteArray, out: Floats) -> None:
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


def _iq4_nl(blocks: ByteArray, out: Floats) -> None:
    """d: f16, 16 bytes of numbers in a table, halves as in Q4_0: d * table[number]."""
    _from_table(blocks[:, 2:], out)
    out *= _scale(blocks, 0)


def _iq4_xs(blocks: ByteArray, out: Floats) -> None:
    """d: f16, high 2 bits of 8 scales: 2 bytes, their low 4 bits: 4 bytes, 128 bytes of numbers in a table.

    Each run of 32 values is 16 bytes, halves as in Q4_0: d * (scale - 32) * table[number].
    """
    _from_table(blocks[:, 8:].reshape(-1, 16), out.reshape(-1, 32))
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = ((blocks[:, 2:4].reshape(-1, 2, 1) >> TWO_BITS.reshape(1, 1, 4)) & 3).reshape(-1, 8)
    scales = (low | (high << 4)).astype(np.int8) - 32
    runs = out.reshape(-1, 8, 32)
    runs *= (scales * _scale(blocks, 0))[:, :, None]


def _from_table(packed: ByteArray, out: Floats) -> None:
    half = packed.shape[1]
    out[:, :half] = LOW_NUMBERS[packed]
    out[:, half:] = HIGH_NUMBERS[packed]


FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    20: BlockFormat("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockFormat("IQ4_XS", 256, 136, _iq4_xs),
    30: BlockFormat("BF16", 1, 2, _bf16),
}
"""GGML's number of a type → its format."""

_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(type: int) -> str:
    """GGML's name of a type, for messages."""
    return FORMATS[type].name if type in FORMATS else _OTHERS.get(type, f"type {type}")
