"""Quantised weights on the disk, by checkpoint and format: the next start maps them instead of quantising again.

A file holds the tensors one after the other, each at a multiple of 64 bytes, then an index in JSON, the index's length
and a magic number. It gets its name once it is whole and synced. Its name is a digest of what it was made from.
"""

import hashlib
import mmap
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from kernels import BFloat16Weight, Int4Weight, Int8Weight, Nf4Weight, QuantisedWeight, hadamard, int4, nf4, quantised
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.demo import cache_directory
from runtime.model.decoder import Decoder
from runtime.support.logs import get_logger
from runtime.support.version import version

FOLDER = "weights"
"""Folder of the files, below the cache directory."""
FORMATS = ("int8", "int4", "nf4")
"""Formats that take long to make: a start with one of them is worth a file."""
MAX_FILES = 4
"""Most files that are kept; the least recently used one is deleted."""
ALIGNMENT = 64
MAGIC = b"EFTQW001"
END_BYTES = 8 + len(MAGIC)
SPARE = 2
"""Times its size that must be free on the disk for a file to be written."""
LEAST_WEIGHTS = 20_000_000
"""Number of weights below which a model is quantised faster than it is worth to keep."""

KINDS = {kind.__name__: kind for kind in (Int8Weight, Int4Weight, Nf4Weight, BFloat16Weight)}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.bool)
}

_log = get_logger("weights")


class CachedTensor(Struct, frozen=True):
    """One tensor of a file."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class CachedParameter(Struct, frozen=True):
    """One parameter: a tensor in floating point, or a quantised weight with the sample from before."""

    kind: str
    """A name of KINDS, or "float"."""
    tensors: dict[str, CachedTensor]
    values: dict[str, int] = {}


class CacheIndex(Struct, frozen=True):
    """The contents of a file."""

    parameters: dict[str, CachedParameter]


_decoder = msgspec.json.Decoder(CacheIndex)


class CacheBroken(Exception):
    """A file that is none of ours, or not whole."""


class WeightCache:
    """The file of one checkpoint in one format: read by `restore`, else written by `keep` and `commit`."""

    def __init__(self, path: Path, *, size: int) -> None:
        """`size`: bytes of the file, at most."""
        self._path = path
        self._size = size
        self._abandoned = False
        self._file: BinaryIO | None = None
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._index: dict[str, CachedParameter] = {}

    @classmethod
    def of(cls, checkpoint: Checkpoint, decoder: Decoder, quantization: str) -> "WeightCache | None":
        """The cache of this checkpoint's weights; None where a file would save too little time, or the
        checkpoint's files cannot be identified."""
        if quantization not in FORMATS or decoder.device.type != "cpu" or decoder.group.size > 1:
            return None
        count = sum(parameter.data.numel() for parameter in decoder.parameters().values())
        if count < LEAST_WEIGHTS:
            return None
        try:
            digest = _digest(checkpoint, decoder, quantization)
        except OSError:
            return None
        return cls(cache_directory() / FOLDER / f"{digest}.{quantization}", size=count)

    # -- reading -----------------------------------------------------------------------------------

    def restore(self, decoder: Decoder) -> bool:
        """Fill the decoder's weights from the file, which is mapped. False where there is none, or none that fits; the
        decoder is then as it was."""
        try:
            mapped, index = _open(self._path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, msgspec.MsgspecError, CacheBroken) as error:
            _log.warning("cached_weights_not_used", path=str(self._path), reason=str(error))
            return False
        parameters = decoder.parameters()
        if index.parameters.keys() != parameters.keys():
            _log.warning("cached_weights_not_used", path=str(self._path), reason="it has other parameters")
            return False
        for name, parameter in parameters.items():
            cached = index.parameters[name]
            tensors = {key: _tensor(mapped, one) for key, one in cached.tensors.items()}
            parameter.stays = cached.kind == "float"
            if cached.kind == "float":
                parameter.restore(tensors["data"], None, decoder.ops)
                continue
            sample = tensors.pop("sample"), tensors.pop("here")
            weight: Any = KINDS[cached.kind]
            parameter.restore(weight(**tensors, **_values(weight, cached.values)), sample, decoder.ops)
        with suppress(OSError):
            os.utime(self._path)  # the order of deletion
        _log.info("cached_weights", path=str(self._path))
        return True

    # -- writing -----------------------------------------------------------------------------------

    def keep(self, name: str, weight: QuantisedWeight, sample: tuple[Tensor, Tensor]) -> None:
        """Write a weight that was just quantised. A disk that takes nothing ends the writing, and is logged once."""
        kind = type(weight).__name__
        if kind not in KINDS:
            self.abandon(f"there is no form for {kind}")
            return
        parts = {field.name: getattr(weight, field.name) for field in fields(weight)}  # type: ignore[arg-type]
        tensors = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
        values = {key: int(value) for key, value in parts.items() if not isinstance(value, Tensor)}
        self._write(name, kind, {**tensors, "sample": sample[0], "here": sample[1]}, values)

    def commit(self, decoder: Decoder) -> None:
        """Write what was not quantised, and give the file its name."""
        if self._file is None:
            return
        for name, parameter in decoder.parameters().items():
            if name in self._index:
                continue
            if parameter.quantised is not None:
                self.abandon(f"{name} was stored in integers")
                return
            self._write(name, "float", {"data": parameter.data}, {})
        self._attempt(self._finish)

    def abandon(self, reason: str) -> None:
        """Write no more, and delete what there is."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
        _log.info("weights_not_cached", reason=reason)
        self._abandoned = True

    def _write(self, name: str, kind: str, tensors: dict[str, Tensor], values: dict[str, int]) -> None:
        def write() -> None:
            if self._file is None:
                self._begin()
            written = {key: self._append(tensor) for key, tensor in tensors.items()}
            self._index[name] = CachedParameter(kind, written, values)

        if not self._abandoned:
            self._attempt(write)

    def _begin(self) -> None:
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < SPARE * self._size:
            raise OSError("the disk is full")
        self._file = open(self._partial, "wb")  # noqa: SIM115  closed by `_finish` or `abandon`

    def _append(self, tensor: Tensor) -> CachedTensor:
        assert self._file is not None
        offset = self._file.tell()
        self._file.write(b"\0" * (-offset % ALIGNMENT))
        offset += -offset % ALIGNMENT
        flat = tensor.detach().contiguous().flatten()
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        return CachedTensor(offset, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def _finish(self) -> None:
        assert self._file is not None
        index = msgspec.json.encode(CacheIndex(self._index))
        self._file.write(index + len(index).to_bytes(8, "little") + MAGIC)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._partial.replace(self._path)
        _delete_old(self._path.parent)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.abandon(error.strerror or str(error))


def _values(kind: type, found: dict[str, int]) -> dict[str, int | bool]:
    """Fields that are no tensors, booleans as such."""
    types = {field.name: field.type for field in fields(kind)}
    return {name: bool(value) if types[name] in (bool, "bool") else value for name, value in found.items()}


def _open(path: Path) -> tuple[mmap.mmap, CacheIndex]:
    """The file, mapped copy-on-write, and its index. Raises `OSError`, `CacheBroken`, `MsgspecError`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= END_BYTES:
            raise CacheBroken("the file is too short")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if mapped[-len(MAGIC) :] != MAGIC:
        raise CacheBroken("the file does not end as one of these")
    length = int.from_bytes(mapped[-END_BYTES : -len(MAGIC)], "little")
    if length > size - END_BYTES:
        raise CacheBroken("its index is longer than the file")
    index = _decoder.decode(mapped[size - END_BYTES - length : size - END_BYTES])
    for parameter in index.parameters.values():
        if parameter.kind != "float" and parameter.kind not in KINDS:
            raise CacheBroken(f"it has a weight of the form {parameter.kind}")
        for tensor in parameter.tensors.values():
            if tensor.dtype not in DTYPES or tensor.offset + _bytes(tensor) > size - END_BYTES - length:
                raise CacheBroken("a tensor lies outside of it")
    return mapped, index


def _bytes(tensor: CachedTensor) -> int:
    count = DTYPES[tensor.dtype].itemsize
    for size in tensor.shape:
        count *= size
    return count


def _tensor(mapped: mmap.mmap, cached: CachedTensor) -> Tensor:
    """A view of the mapped file, [*shape]."""
    dtype, size = DTYPES[cached.dtype], _bytes(cached)
    if not size:
        return torch.empty(cached.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=size // dtype.itemsize, offset=cached.offset).view(cached.shape)


def _digest(checkpoint: Checkpoint, decoder: Decoder, quantization: str) -> str:
    """Digest of the files, by size and time, and of what is made of them. Raises `OSError`."""
    source = checkpoint.source.resolve()
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    makers = (hadamard, int4, nf4, quantised)
    parts = [hashlib.blake2b(Path(str(maker.__file__)).read_bytes()).hexdigest() for maker in makers]
    parts += [version(), quantization, str(decoder.dtype), repr(decoder.spec), str(source)]
    for path in files:
        found = path.stat()
        parts.append(f"{path.name} {found.st_size} {found.st_mtime_ns}")
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _delete_old(folder: Path) -> None:
    """Delete files beyond the newest MAX_FILES, and what an earlier process did not finish."""
    with suppress(OSError):
        whole = sorted(
            (path for path in folder.iterdir() if path.suffix != ".partial"), key=lambda path: -path.stat().st_mtime
        )
        for path in (*whole[MAX_FILES:], *folder.glob("*.partial")):
            path.unlink(missing_ok=True)
