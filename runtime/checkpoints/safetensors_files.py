"""The safetensors files of a model directory: one, or several with an index. Pickles are refused.

Files are mapped. A tensor is read from the disk when the model copies it, and its pages are released at the next one.
"""

from __future__ import annotations

import json
import mmap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from runtime.model.config import ModelLoadError, read_json_object
from runtime.support.logs import get_logger

if TYPE_CHECKING:
    import torch


# -- mapped ----------------------------------------------------------------------------------------
#
# A mapped safetensors file: tensors are views, and pages are released after use.
#
# Format: https://github.com/huggingface/safetensors#format. The library checks a file's header; its own tensors keep
# every page that was read resident until the file is closed, so a model would be in memory twice while it is copied. We
# copy nevertheless: in the file tensors begin at any byte, kernels are faster with whole cache lines and huge pages,
# and a file that is cut off while it is mapped kills the process.

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Name of a type in a header → torch's type."""


@dataclass(frozen=True)
class Place:
    """Location of a tensor, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """One file, whose header the library has checked."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header. Raises `ModelLoadError`."""
        self._path = path
        try:
            with path.open("rb") as file:
                # Private: torch requires a writable buffer. Nothing writes to it.
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

        place, dtype = self.places[name], self._dtype(name)
        if place.start == place.end:
            return torch.empty(place.shape, dtype=dtype)
        found = torch.frombuffer(self._map, dtype=dtype, count=prod(place.shape), offset=place.start)
        return found.view(place.shape)

    def described(self, name: str) -> torch.Tensor:
        """A tensor of the same shape and type without values, on the device `meta`: nothing but the header is read."""
        import torch

        return torch.empty(self.places[name].shape, dtype=self._dtype(name), device="meta")

    def _dtype(self, name: str) -> torch.dtype:
        import torch

        stored = self.places[name].dtype
        dtype: torch.dtype | None = getattr(torch, DTYPES.get(stored, ""), None)
        if dtype is None:
            raise ModelLoadError(f"{self._path}: {name} is of type {stored}, which is not supported.")
        return dtype

    def drop(self, name: str) -> None:
        """Release the pages of a tensor. Its next use reads the disk again."""
        place = self.places[name]
        drop_pages(self._map, place.start, place.end)


def drop_pages(memory: mmap.mmap, start: int, end: int) -> None:
    """Release the pages of the bytes from `start` to `end` of a mapped file."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(memory, "madvise") and end > first:
        memory.madvise(mmap.MADV_DONTNEED, first, end - first)


_log = get_logger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class WeightFiles:
    """The tensors to read from each file, in the order of reading."""

    names: dict[Path, list[str]]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, views of the mapped files."""
        files = self.open()
        for names in self.names.values():
            for name in names:
                yield name, files.read(name)
                files.drop()

    def described(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors without values, in the same order."""
        for path, names in self.names.items():
            file = MappedFile(path)
            for name in names:
                yield name, file.described(name)

    def open(self) -> OpenFiles:
        return OpenFiles({name: path for path, names in self.names.items() for name in names})


class OpenFiles:
    """The tensors of a model by name, across its files. Files are mapped at their first use."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._files: dict[Path, MappedFile] = {}
        self._read: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, a view of its file. Raises `ModelLoadError`."""
        path = self._paths[name]
        if path not in self._files:
            self._files[path] = MappedFile(path)
        self._read.append(name)
        return self._files[path].tensor(name)

    def drop(self) -> None:
        """Release the pages of everything read since the last call."""
        for name in self._read:
            self._files[self._paths[name]].drop(name)
        self._read.clear()


def find_weights(directory: Path) -> WeightFiles:
    """The weights of a model directory, every file's header checked. Raises `ModelLoadError`.

    A single file precedes an index that does not name it, as in transformers: indices of an earlier, sharded form of
    the model often remain in the directory.
    """
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and not (index and SINGLE in _files_of(directory / INDEX)):
        if index:
            _log.warning("index_ignored", directory=str(directory), file=SINGLE, index=INDEX)
        return WeightFiles({directory / SINGLE: _names_in(directory / SINGLE)})
    if index:
        return _indexed(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return WeightFiles({files[0]: _names_in(files[0])})
    if files:
        raise ModelLoadError(
            f"{directory} holds {len(files)} safetensors files, and no {INDEX} to say which tensor is where."
        )
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelLoadError(_pickle_message(directory, pickles[0]))
    raise ModelLoadError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}.")


def _files_of(index: Path) -> set[str]:
    """The files that an index names, as far as it can be read."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ModelLoadError:
        return set()
    return {file for file in weight_map.values() if isinstance(file, str)} if isinstance(weight_map, dict) else set()


def _indexed(directory: Path) -> WeightFiles:
    index = directory / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map of tensor names to files.")
    by_file: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: {name} must be in a safetensors file beside the index, not {file!r}.")
        by_file[file].append(name)
    missing = [file for file in by_file if not (directory / file).is_file()]
    if missing:
        raise ModelLoadError(
            f"{index} names {len(by_file)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Is the download complete?"
        )
    for file, names in by_file.items():
        absent = set(names).difference(_names_in(directory / file))
        if absent:
            raise ModelLoadError(f"{directory / file} lacks {min(absent)}, which {INDEX} says is in it.")
    return WeightFiles({directory / file: sorted(names) for file, names in sorted(by_file.items())})


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        names: list[str] = sorted(file.keys())
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as safetensors: {error}. Is the download complete?") from error


def _pickle_message(directory: Path, name: str) -> str:
    return (
        f"{directory} holds its weights as pickles ({name}), which can run any code when they are loaded, so "
        "they are refused. Where you trust the file, convert it once:\n"
        "  python -c \"import transformers as t; d = '" + str(directory) + "'; "
        "t.AutoModelForCausalLM.from_pretrained(d, dtype='auto').save_pretrained(d + '-safetensors'); "
        "t.AutoTokenizer.from_pretrained(d).save_pretrained(d + '-safetensors')\"\n"
        f"and load {directory}-safetensors."
    )
