"""A safetensors file in memory as the system maps it: tensors are views, and pages go when they were used.

Format: https://github.com/huggingface/safetensors#format. The library checks a file's header; its own tensors keep
every page that was read resident until the file is closed, so a model would be in memory twice while it is copied. We
copy all the same: in the file tensors begin at any byte, kernels like whole cache lines and huge pages, and a file that
is cut off while it is mapped kills the process.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.workers.loading.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names of types in a header → torch's."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """One file, whose header the library has checked."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError`."""
        self._path = path
        try:
            with path.open("rb") as file:
                # Private, so that torch may believe that it can write; nothing does.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be mapped: {error}") from error
        size = int.from_bytes(self._map[:8], "little")
        header: dict[str, Any] = json.loads(self._map[8 : 8 + size])
        header.pop("__metadata__", None)
        self.places = {
            name: Place(
                one["dtype"],
                tuple(one["shape"]),
                8 + size + one["data_offsets"][0],
                8 + size + one["data_offsets"][1],
            )
            for name, one in header.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the map, valid for as long as it is kept. Raises `ModelLoadError` for types that torch lacks."""
        import torch

        place = self.places[name]
        dtype = getattr(torch, DTYPES.get(place.dtype, ""), None)
        if dtype is None:
            raise ModelLoadError(f"{self._path}: {name} is of type {place.dtype}, which is not supported.")
        if place.start == place.end:
            return torch.empty(place.shape, dtype=dtype)
        found = torch.frombuffer(self._map, dtype=dtype, count=prod(place.shape), offset=place.start)
        return found.view(place.shape)

    def drop(self, name: str) -> None:
        """Let the pages of a tensor go. One that is looked at again is read from the disk again."""
        place = self.places[name]
        drop_pages(self._map, place.start, place.end)


def drop_pages(memory: mmap.mmap, start: int, end: int) -> None:
    """Tell the system that the bytes from `start` to `end` of a map of a file are not needed now."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(memory, "madvise") and end > first:
        memory.madvise(mmap.MADV_DONTNEED, first, end - first)
