"""The two ways in which the decoder attends: over the paged cache (serving), and without one (training).

The decoder hands unrotated queries, keys and values to whichever it was given; it does not know which.
"""

from typing import Protocol

from torch import Tensor

from kernels import Ops, PagedRows
from runtime.workers.kv_cache import KVCache


class Attention(Protocol):
    """Called once a layer with q [T, H, D] and k, v [T, G, D], before rope; returns [T, H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class PagedAttention:
    """Serving: writes keys and values into the cache, and attends to all of each row's cached tokens."""

    def __init__(self, ops: Ops, cache: KVCache, rows: PagedRows, scale: float) -> None:
        self._ops = ops
        self._cache = cache
        self._rows = rows
        self._scale = scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = self._cache.layers[layer]
        q, k = self._ops.rope_and_cache(q, k, v, cos, sin, keys, values, self._rows.slots)
        return self._ops.paged_attention(q, k, v, keys, values, self._rows, self._scale)


class PackedAttention:
    """Training and scoring: whole sequences packed one after the other, differentiable, no cache."""

    def __init__(self, ops: Ops, lengths: list[int], scale: float) -> None:
        self._ops = ops
        self._lengths = lengths
        self._scale = scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        return self._ops.packed_attention(q, k, v, self._lengths, self._scale)
