"""The container of a GGUF file: metadata and the location of each tensor. Independent of models.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. We do not use the
`gguf` package: it makes a numpy array for every string of the vocabulary (seconds at start-up, against hundredths), and
trusts the sizes that a file claims. Here every size is checked against the rest of the file before it is used.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from runtime.model.config import ModelLoadError, read_optional_json_object

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a value type → its `struct` code."""
_LENGTH = struct.Struct("<Q")
"""Length of a string, in bytes, before it."""


@dataclass(frozen=True)
class TensorInfo:
    """Location, shape and type of a tensor."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch; the file has the reverse order."""
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
        """Map the file and read its header. Raises `ModelLoadError` when it is absent, not GGUF, cut off or
        inconsistent."""
        self.path = path
        try:
            with path.open("rb") as file:
                # Private: torch requires a writable buffer. Nothing writes to it.
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
        self.entries: dict[str, tuple[int, int]] = {}
        """Key → start and end of its entry in the file, the key included."""
        for _ in range(num_fields):
            start = cursor.at
            key = cursor.string()
            if key in self.fields:
                raise cursor.error(f"the key {key!r} occurs twice")
            self.fields[key] = cursor.value(cursor.number("I"))
            self.entries[key] = start, cursor.at
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
    """Forward reader; raises `ModelLoadError` for values that do not fit in the rest of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.at = 0
        self._data = data
        self._path = path

    def error(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path} is damaged near byte {self.at}: {reason}.")

    def expect(self, count: int, size: int, what: str) -> None:
        """Refuse `count` things of at least `size` bytes each where the rest of the file is too short for them."""
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

    def strings(self, count: int) -> list[str]:
        """`count` strings, one behind the other. Of a vocabulary and its merges there are a hundred thousand."""
        data, at, found = self._data, self.at, []
        try:
            for _ in range(count):
                start = at + _LENGTH.size
                at = start + _LENGTH.unpack_from(data, at)[0]
                if at > len(data):
                    raise ValueError("the file ends within a string")
                found.append(data[start:at].decode("utf-8"))
        except (struct.error, ValueError):
            return [self.string() for _ in range(count)]  # raises the error that names the place
        self.at = at
        return found

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
            return self.strings(count)
        if item_type in SCALARS:
            return list(self.numbers(SCALARS[item_type], count))
        raise self.error(f"arrays of value type {item_type} are not supported")


# -- pieces ----------------------------------------------------------------------------------------
#
# Sentencepiece's scored pieces as the ranked merges of a BPE.
#
# Sentencepiece joins the neighbours that make the piece with the best score. A BPE joins by rank. The results are the
# same when every way to make a piece out of two others is a merge, ranked by the piece's score.


def merges_of_pieces(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges, the best first, for pieces with their scores (higher is better)."""
    found: list[tuple[float, int, tuple[str, str]]] = []
    for piece, score in scores.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -cut, (left, right)))
    found.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in found]


# -- metadata --------------------------------------------------------------------------------------
#
# Typed look-ups in the metadata of a GGUF file.

T = TypeVar("T")

# The keys of a generation_config.json that llama.cpp's converters keep.
_GENERATION = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class Metadata:
    """The key-value pairs of a file. An absent value is None; one of the wrong type raises `ModelLoadError`.

        A key that starts with a dot belongs to the model's architecture: `.block_count` is
    `llama.block_count`.
    """

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self._fields = fields
        self.path = path
        self.architecture = ""
        self.architecture = self.require(self.text("general.architecture"), "general.architecture")

    def integer(self, key: str) -> int | None:
        value = self._get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.error(key, f"must be an integer, got {_brief(value)}")

    def size(self, key: str) -> int:
        """A required integer above 0. Raises `ModelLoadError`."""
        value = self.require(self.integer(key), key)
        if value < 1:
            raise self.error(key, f"must be at least 1, got {value}")
        return value

    def number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self.error(key, f"must be a number, got {_brief(value)}")

    def flag(self, key: str) -> bool | None:
        value = self._get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(key, f"must be true or false, got {_brief(value)}")

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.error(key, f"must be a string, got {_brief(value)}")

    def texts(self, key: str) -> list[str] | None:
        value = self._list(key)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be strings")
        return value

    def numbers(self, key: str) -> list[float] | None:
        """An array of numbers, integers or not."""
        value = self._list(key)
        if value is not None and not all(isinstance(item, int | float) for item in value):
            raise self.error(key, "must be numbers")
        return value

    def require(self, value: T | None, key: str) -> T:
        if value is None:
            raise self.error(key, "is missing")
        return value

    def error(self, key: str, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {self._full(key)} {reason}.")

    def _list(self, key: str) -> list[Any] | None:
        value = self._get(key)
        if value is None or isinstance(value, list):
            return value
        raise self.error(key, f"must be an array, got {_brief(value)}")

    def _get(self, key: str) -> Any:
        return self._fields.get(self._full(key))

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key


def generation_of(metadata: Metadata) -> dict[str, Any]:
    """The generation config of a GGUF file: the one beside it, else the keys in it. Raises `ModelLoadError`."""
    if beside := read_optional_json_object(metadata.path.parent / "generation_config.json"):
        return beside
    found = {name: metadata.number(key) for key, name in _GENERATION.items()}
    return {name: value for name, value in found.items() if value is not None}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
