"""Memory for weights, in pages of 2 MB where Linux has them.

Every step reads all of it, and so many small pages take time to find, in virtual machines twice.
"""

import mmap
from math import prod
from threading import Lock

import torch
from torch import Tensor

from kernels.pages import mapped

CHUNK = 64 << 20
"""Bytes that are asked for at a time. What is not used of them is not taken."""
SMALL = 64 << 10
"""Bytes below which a tensor is left to torch."""
_LINE = 64

_lock = Lock()
_chunk: mmap.mmap | None = None
_used = 0


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
