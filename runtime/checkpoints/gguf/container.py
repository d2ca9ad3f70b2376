"""The container of a GGUF file: metadata, and where each tensor lies. Knows nothing of models.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Written
here rather than taken from the `gguf` package, because that one makes a numpy array for every string of the
vocabulary (seconds at start-up, against hundredths), and trusts the sizes that a file claims: every size
here is checked against what is left of the file before it is used.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from runtime.workers.loading.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a value type, and the `struct` code of it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch; the file has it the other way round."""
    type: int
    """GGML's number of the block format."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


class GgufFile:
    """A mapped GGUF file. The map lives as long as anything refers to it."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError` when the file is absent, not GGUF, cut off or inconsistent."""
        self.path = path
        try:
            with path.open("rb") as file:
                # Private, so that torch may believe that it can write; nothing does.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise ModelLoadError(f"Cannot read the GGUF file {path}: {error}") from error
        cursor = _Cursor(self.data, path)
        if cursor.take(4) != MAGIC:
            raise ModelLoadError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF.")
        version = cursor.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "big-endian" if swapped else f"version {version}"
            raise ModelLoadError(f"{path}: {kind} GGUF is not supported; versions 2 and 3, little-endian, are.")
        num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
        cursor.expect(num_fields, 13, "metadata fields")  # the smallest: a key's length, a type, one byte
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string()
            if key in self.fields:
                raise cursor.error(f"the key {key!r} occurs twice")
            self.fields[key] = cursor.value(cursor.number("I"))
        cursor.expect(num_tensors, 32, "tensors")
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment must be a power of two, not {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, type, offset in infos:
            if name in self.tensors:
                raise cursor.error(f"the tensor {name!r} occurs twice")
            if offset % alignment:
                raise cursor.error(f"the offset {offset} of tensor {name!r} is not a multiple of {alignment}")
            self.tensors[name] = TensorInfo(name, shape, type, start + offset)


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.number("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    shape = cursor.numbers("Q", num_dimensions)
    return name, tuple(reversed(shape)), cursor.number("I"), cursor.number("Q")


class _Cursor:
    """Reads forward; whatever does not fit in the rest of the file is an error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.at = 0
        self._data = data
        self._path = path

    def error(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path} is damaged near byte {self.at}: {reason}.")

    def expect(self, count: int, size: int, what: str) -> None:
        """Refuse a count of things of at least `size` bytes that the file is too short for."""
        left = len(self._data) - self.at
        if count * size > left:
            raise self.error(f"{count} {what} are announced, but only {left} bytes follow; is it cut off?")

    def take(self, size: int) -> bytes:
        self.expect(size, 1, "bytes")
        self.at += size
        return self._data[self.at - size : self.at]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        self.expect(count, struct.calcsize("<" + code), "numbers")
        values = struct.unpack_from(f"<{count}{code}", self._data, self.at)
        self.at += struct.calcsize("<" + code) * count
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        size = self.number("Q")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string is not UTF-8 ({error.reason})") from error

    def value(self, type: int) -> Any:
        if type == STRING:
            return self.string()
        if type == ARRAY:
            return self.array()
        if type in SCALARS:
            return self.number(SCALARS[type])
        raise self.error(f"{type} is not the number of a value type")

    def array(self) -> list[Any]:
        item_type, count = self.number("I"), self.number("Q")
        if item_type == STRING:
            self.expect(count, 8, "strings")
            return [self.string() for _ in range(count)]
        if item_type in SCALARS:
            return list(self.numbers(SCALARS[item_type], count))
        raise self.error(f"arrays of value type {item_type} are not supported")
