"""The memory of the paged KV cache: one key and one value tensor a layer, heads as `kernels.cache` has them. Who owns a
block is not known here."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import cache
from kernels.pages import mapped


class KVCache:
    """`layers[i]` is (keys, values), each [num_blocks, block_size, kv_heads, width], zero at first."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        """`shapes` has (kv_heads, head_dim) of every layer; `pinned`: in host memory that a GPU reads and writes by
        itself."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        sizes = [(num_blocks, block_size, heads, cache.width(dtype, size)) for heads, size in shapes]
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
        """Zero those of `blocks` that hold NaN or infinity: masked attention multiplies what it skips by
        0, and NaN times 0 is NaN, so whoever gets such a block next would be broken too."""
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
