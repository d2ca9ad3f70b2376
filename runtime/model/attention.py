"""Attention over the paged KV cache (serving) and without one (training), and the memory of that cache."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels import AdaptedTokens, Ops, PagedContext, PagedRows, cache
from kernels.pages import mapped
from runtime.model.spec import DecoderSpec, LayerSpec

# -- kv cache --------------------------------------------------------------------------------------
#
# The memory of the paged KV cache: one key and one value tensor a layer, heads as `kernels.cache` has them. The
# ownership of blocks is kept elsewhere.

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Value of the setting `cache.kv_cache_dtype` → torch dtype."""


class KVCache:
    """`layers[i]` is (keys, values), each [num_blocks, block_size, kv_heads, width], zero at first; with a spare block
    there is one more."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool = False,
        spare: bool = False,
    ) -> None:
        """Allocate the cache. `shapes` has (kv_heads, head_dim) of every layer; `pinned`: in host memory that a GPU
        reads and writes directly; `spare`: with one block more, for rows that are no sequence's."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.spare_block = num_blocks
        """Id of the spare block, if there is one."""
        sizes = [(num_blocks + spare, block_size, heads, cache.width(dtype, size)) for heads, size in shapes]
        self.layers = [(_zeros(size, dtype, device, pinned), _zeros(size, dtype, device, pinned)) for size in sizes]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the content of whole blocks, each from the first of a pair to the second. No block is in both places."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, dtype=torch.int64, device=self.layers[0][0].device).unbind(1)
        for keys, values in self.layers:
            keys[target] = keys[source]
            values[target] = values[source]

    def copy_to(self, other: "KVCache", pairs: list[tuple[int, int]]) -> None:
        """Copy the content of whole blocks to another cache of the same shape, here from the first of a pair and
        there to the second."""
        source, target = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        source = source.to(self.layers[0][0].device)
        target = target.to(other.layers[0][0].device)
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            for here, there in zip(ours, theirs, strict=True):
                there[target] = here[source].to(there.device)

    def clear_broken(self, blocks: list[int]) -> None:
        """Zero the blocks of `blocks` that hold NaN or infinity. Masked attention multiplies skipped values by 0, and
        NaN times 0 is NaN: the next owner of such a block would be broken too."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.layers[0][0].device)
        for keys, values in self.layers:
            for tensor in (keys, values):
                tensor[index[~cache.is_finite(tensor[index])]] = 0


def block_bytes(shapes: Sequence[tuple[int, int]], *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers; `shapes` as in `KVCache`."""
    return 2 * block_size * sum(heads * cache.width(dtype, size) for heads, size in shapes) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    if pinned or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
    # An idle cache costs no memory.
    memory = mapped(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# -- attention -------------------------------------------------------------------------------------
#
# The two implementations of attention: over the paged cache (serving), and without one (training).
#
# The decoder passes unrotated queries, keys and values to the one that it was given, and does not depend on which. The
# settings of a layer (window, rope) are read from the spec by the layer's index.


class Attention(Protocol):
    """Called once a layer with q [T, H, D] and k, v [T, G, D], before rope, and `Decoder.angles`'s cosines and
    sines [tables, T, R / 2]; returns [T, H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def paged(self, adapted: Sequence[AdaptedTokens]) -> PagedContext | None:
        """The same for a backend that runs all layers in one call, with the adapters of the batch; None without a
        cache."""


class PagedAttention:
    """Serving: writes keys and values into the cache, and attends to all of each row's cached tokens."""

    def __init__(self, ops: Ops, cache: KVCache, rows: PagedRows, spec: DecoderSpec) -> None:
        self._ops = ops
        self._cache = cache
        self._rows = rows
        self._spec = spec

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one, (keys, values), rows = self._spec.layers[layer], self._cache.layers[layer], self._rows
        q, k = self._ops.rope_and_cache(q, k, v, _table(cos, one), _table(sin, one), keys, values, rows.slots)
        return self._ops.paged_attention(
            q, k, v, keys, values, rows, self._spec.scale, window=one.window, softcap=self._spec.softcap
        )

    def paged(self, adapted: Sequence[AdaptedTokens]) -> PagedContext:
        return PagedContext(self._cache.layers, self._rows, adapted)


class PackedAttention:
    """Training and scoring: whole sequences packed one after the other, differentiable, no cache."""

    def __init__(self, ops: Ops, lengths: list[int], spec: DecoderSpec) -> None:
        self._ops = ops
        self._lengths = lengths
        self._spec = spec

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one = self._spec.layers[layer]
        cos, sin = _table(cos, one), _table(sin, one)
        q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        return self._ops.packed_attention(
            q, k, v, self._lengths, self._spec.scale, window=one.window, softcap=self._spec.softcap
        )

    def paged(self, adapted: Sequence[AdaptedTokens]) -> None:
        return None


def _table(angles: Tensor, layer: LayerSpec) -> Tensor:
    """The layer's table, [T, R / 2], out of [tables, T, R / 2]; [T, 0] for a layer without rope."""
    return angles[0, :, :0] if layer.rope is None else angles[layer.rope]
