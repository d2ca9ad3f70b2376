"""Memory in pages of 2 MB, where the system has them.

Every step reads all weights. Their many small pages would take time to look up, in virtual machines twice.
"""

import mmap
from contextlib import suppress
from math import prod
from threading import Lock

import torch
from torch import Tensor

CHUNK = 64 << 20
"""Bytes that are mapped at a time. Unused ones take no memory."""
SMALL = 64 << 10
"""Bytes below which a tensor is left to torch."""
_LINE = 64

_lock = Lock()
_chunk: mmap.mmap | None = None
_used = 0


def mapped(size: int) -> mmap.mmap:
    """`size` bytes of zeros of this process's own.

    Mapped, not allocated: the system hands out pages when they are first touched, so unused ones cost no memory;
    large ones make that first touch cheap, and are found faster.
    """
    # Shared memory, which is mmap's default, has small pages only.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # not every system has large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is not initialised, from the beginning of a cache line on."""
    size = prod(shape) * dtype.itemsize
    if size < SMALL:
        return torch.empty(shape, dtype=dtype)
    global _chunk, _used
    with _lock:
        if _chunk is None or _used + size > len(_chunk):
            _chunk, _used = mapped(max(size, CHUNK)), 0
        found = torch.frombuffer(_chunk, dtype=dtype, count=prod(shape), offset=_used)
        _used += -(-size // _LINE) * _LINE
    return found.view(shape)
