"""Writer of GGUF files (version 3), and floats as GGML's blocks: F32, F16, BF16, Q8_0 and Q4_K.

Container: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks as in ggml-common.h of llama.cpp; what
`runtime.checkpoints.gguf.blocks` reads, this module writes.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoints.gguf.blocks import FORMATS, VALUES_AT_ONCE, BlockFormat, ByteArray, Floats
from runtime.checkpoints.gguf.container import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING
from runtime.support.durable import create_file

VERSION = 3
F32, F16, Q8_0, Q4_K, BF16 = 0, 1, 8, 12, 30
"""GGML's numbers of types."""
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_k": Q4_K}
"""Name of a type, for users → GGML's number."""
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
"""GGUF's numbers of value types."""

# -- metadata --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A value of the metadata. `type` is GGUF's number, that of the items where `value` is a list."""

    type: int
    value: Any

    def encode(self) -> bytes:
        """The number of the type, and the value."""
        if isinstance(self.value, list):
            head = struct.pack("<IIQ", ARRAY, self.type, len(self.value))
            if self.type == STRING:
                return head + b"".join(map(_string, self.value))
            return head + struct.pack(f"<{len(self.value)}{SCALARS[self.type]}", *self.value)
        body = _string(self.value) if self.type == STRING else struct.pack("<" + SCALARS[self.type], self.value)
        return struct.pack("<I", self.type) + body


def value_of(value: str | bool | int | float | list[str] | list[int] | list[float]) -> Value:
    """A value in the type that llama.cpp's converters use: uint32, float32, bool, string; of lists, int32."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str):
        return Value(STRING, value)
    if isinstance(first, bool):
        return Value(BOOL, value)
    if isinstance(first, float):
        return Value(FLOAT32, value)
    return Value(INT32 if isinstance(value, list) else UINT32, value)


def encode_field(key: str, value: Value) -> bytes:
    """One entry of the metadata, as it is in a file."""
    return _string(key) + value.encode()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


# -- file ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OutTensor:
    """A tensor to write. `data` is called once, when its place in the file is reached."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first."""
    type: int
    data: Callable[[], Iterable[ByteArray]]

    @property
    def num_bytes(self) -> int:
        return FORMATS[self.type].num_bytes(prod(self.shape))


def write_gguf(path: Path, fields: Mapping[str, bytes], tensors: Sequence[OutTensor]) -> None:
    """Write a new file and sync it. `fields`: key → its encoded entry (`encode_field`). Raises `OSError`, and
    `ValueError` where a tensor's data are not as long as announced."""
    with create_file(path) as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
        for entry in fields.values():
            file.write(entry)
        offset = 0
        for tensor in tensors:
            dimensions = tuple(reversed(tensor.shape))
            file.write(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
            file.write(struct.pack("<IQ", tensor.type, offset))
            offset += _padded(tensor.num_bytes)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        for tensor in tensors:
            written = 0
            for data in tensor.data():
                written += file.write(data.data)
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name}: {written} bytes were given for {tensor.num_bytes}")
            file.write(bytes(_padded(written) - written))
        file.flush()
        os.fsync(file.fileno())


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


# -- blocks ----------------------------------------------------------------------------------------


def type_for(wanted: int, shape: tuple[int, ...]) -> int:
    """The type in which a tensor is written where `wanted` is asked for: vectors stay float32, and rows that are no
    whole blocks take the next larger type that fits."""
    if len(shape) < 2:
        return F32
    for type in (wanted, Q8_0):
        if FORMATS[type].values <= FORMATS[wanted].values and shape[-1] % FORMATS[type].values == 0:
            return type
    return F16


def quantise(type: int, values: Floats) -> Iterator[ByteArray]:
    """Blocks of a type for float32 values of any shape, uint8, some at a time."""
    format = FORMATS[type]
    flat = values.reshape(-1)
    step = VALUES_AT_ONCE // format.values * format.values
    for start in range(0, len(flat), step):
        yield _ENCODERS[type](flat[start : start + step], format)


def _f32(values: Floats, format: BlockFormat) -> ByteArray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)


def _f16(values: Floats, format: BlockFormat) -> ByteArray:
    return values.astype(np.float16).view(np.uint8)


def _bf16(values: Floats, format: BlockFormat) -> ByteArray:
    """The upper halves, rounded to the nearest even. Values are finite: weights were checked."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.uint8)


def _q8_0(values: Floats, format: BlockFormat) -> ByteArray:
    """d: f16, q: 32 int8."""
    rows = values.reshape(-1, 32)
    scales = np.abs(rows).max(axis=1, keepdims=True) / 127
    numbers = np.rint(np.divide(rows, scales, out=np.zeros_like(rows), where=scales > 0)).astype(np.int8)
    return np.concatenate([_halves(scales), numbers.view(np.uint8)], axis=1).reshape(-1)


def _q4_k(values: Floats, format: BlockFormat) -> ByteArray:
    """d: f16, dmin: f16, 12 bytes with 8 scales and 8 minima of 6 bits, 128 bytes with two values each."""
    runs = values.reshape(-1, 8, 32)
    scales, minima = _fit(runs)
    d, dmin = scales.max(axis=1, keepdims=True) / 63, minima.max(axis=1, keepdims=True) / 63
    scale_codes, minimum_codes = _codes(scales, d, 63), _codes(minima, dmin, 63)
    steps = _as_half(d) * scale_codes
    offsets = _as_half(dmin) * minimum_codes
    numbers = _codes(runs + offsets[:, :, None], steps[:, :, None], 15).reshape(-1, 4, 2, 32)
    packed = (numbers[:, :, 0] | (numbers[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([_halves(d), _halves(dmin), _pack(scale_codes, minimum_codes), packed], axis=1).reshape(-1)


CANDIDATES = np.linspace(-1.0, 1.0, 21, dtype=np.float32)
"""Differences from 15 of the number of steps between the least and the largest value that are tried for a run."""


def _fit(runs: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum (at least 0, subtracted) for each run of 32 values, [blocks, 8]: of some candidates the pair
    with the least square error, larger values weighing more."""
    weights = np.sqrt(np.square(runs).mean(axis=2, keepdims=True)) + np.abs(runs)
    low = np.minimum(runs.min(axis=2), 0)
    high = np.maximum(runs.max(axis=2), 0)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    best_scale, best_minimum = np.zeros_like(low), np.zeros_like(low)
    total, first = weights.sum(axis=2), (weights * runs).sum(axis=2)
    for change in CANDIDATES:
        steps = (high - low) / (15 + change)
        numbers = _codes(runs - low[:, :, None], steps[:, :, None], 15).astype(np.float32)
        # Least squares for scale and minimum with these numbers.
        square, single = (weights * numbers**2).sum(axis=2), (weights * numbers).sum(axis=2)
        product = (weights * numbers * runs).sum(axis=2)
        determinant = total * square - single**2
        usable = determinant > 0
        scale = np.divide(total * product - first * single, determinant, out=np.zeros_like(low), where=usable)
        minimum = np.divide(square * first - single * product, determinant, out=np.zeros_like(low), where=usable)
        positive = minimum > 0  # cannot be stored: the best scale without one
        scale = np.where(positive, np.divide(product, square, out=np.zeros_like(low), where=square > 0), scale)
        minimum = np.where(positive, 0, minimum)
        error = (weights * (scale[:, :, None] * numbers + minimum[:, :, None] - runs) ** 2).sum(axis=2)
        better = (error < best) & (scale >= 0)
        best = np.where(better, error, best)
        best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum, best_minimum)
    return best_scale, -best_minimum


def _pack(scales: NDArray[np.uint8], minima: NDArray[np.uint8]) -> ByteArray:
    """Eight scales and eight minima of 6 bits as 12 bytes: whole for the first four runs; of the last four the lower
    halves are in the last bytes, and the upper bits above the first."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    high = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    top = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return np.concatenate([low, high, top], axis=1)


def _codes(values: Floats, step: Floats, most: int) -> NDArray[np.uint8]:
    """The nearest multiples of `step`, from 0 to `most`; 0 where the step is 0."""
    step = np.broadcast_to(step, values.shape)
    numbers = np.divide(values, step, out=np.zeros(values.shape, dtype=np.float32), where=step > 0)
    return np.clip(np.rint(numbers), 0, most).astype(np.uint8)


def _as_half(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _halves(values: Floats) -> ByteArray:
    """[blocks, 1] as float16, uint8 [blocks, 2]."""
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8).reshape(-1, 2)


_ENCODERS: Mapping[int, Callable[[Floats, BlockFormat], ByteArray]] = {
    F32: _f32,
    F16: _f16,
    BF16: _bf16,
    Q8_0: _q8_0,
    Q4_K: _q4_k,
}
