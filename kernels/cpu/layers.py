"""All layers in one call of the C++ op `eft_layers`."""

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.cpu.library import address
from kernels.cpu.lora import LoraLayout
from kernels.cpu.tiles import TILE, Tiles
from kernels.interface import PagedRows
from kernels.quantised import Weight
from kernels.stack import PLACES, AdaptedTokens, Layers, LayerStack, LayerWeights, LinearWeights, StackFactors

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What the KV cache may hold, and its number in `attention.h`."""
_TENSORS = 3
"""That a weight has at most."""

OpOf = Callable[[Weight], tuple[Any, tuple[Tensor, ...]]]
"""The C++ linear for a weight, and the tensors that it takes."""


class CpuLayers(Layers):
    """Holds what the C++ op has the addresses of."""

    def __init__(self, stack: LayerStack, lib: ctypes.CDLL, op_of: OpOf) -> None:
        """For weights that all have a C++ linear, and norms and biases in float32 on the CPU."""
        self._lib = lib
        self._stack = stack
        self._table = array("q")
        for layer in stack.layers:
            self._table.extend(_layer(layer, op_of))
        self._caches: Sequence[tuple[Tensor, Tensor]] = ()
        self._addresses = array("q")
        self._adapters: WeakKeyDictionary[StackFactors, array[int] | None] = WeakKeyDictionary()
        qkv, _, gate_up, _ = (linear.weight for linear in stack.layers[0].linears)
        self._sizes = (qkv.shape[1], gate_up.shape[0] // 2, stack.heads, stack.kv_heads, stack.head_dim)

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        rows: PagedRows,
        adapted: Sequence[AdaptedTokens] = (),
        wanted: Tensor | None = None,
    ) -> Tensor | None:
        stack, kept = self._stack, self._kept(caches)
        adapters = self._adapter_table(adapted, len(hidden))
        last = None if wanted is None else self._wanted(wanted, rows, adapted)
        if kept is None or adapters is None or (last is None and wanted is not None):
            return None
        if hidden.dtype is not torch.float32 or cos.dtype is not torch.float32:
            return None
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._lib.eft_layers(
            self._table.buffer_info()[0],
            len(stack.layers),
            *self._sizes,
            stack.eps,
            stack.scale,
            stack.softcap,
            kept.buffer_info()[0],
            CACHE_TYPES[caches[0][0].dtype],
            hidden.data_ptr(),
            len(hidden),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[2],
            rows.slots.data_ptr(),
            rows.tables.data_ptr(),
            rows.tables.shape[1],
            rows.extents.data_ptr(),
            len(rows.counts),
            rows.block_size,
            adapters.buffer_info()[0],
            len(adapted),
            None if last is None else last.address,
            torch.get_num_threads(),
        )
        return hidden if wanted is None else hidden[: len(wanted)]

    def _kept(self, caches: Sequence[tuple[Tensor, Tensor]]) -> "array[int] | None":
        """The addresses of all caches; None where they are of a type that is not ours."""
        if caches is not self._caches:
            if any(cache.dtype not in CACHE_TYPES or cache.device.type != "cpu" for both in caches for cache in both):
                return None
            self._caches = caches
            self._addresses = array("q", (cache.data_ptr() for both in caches for cache in both))
        return self._addresses

    def _adapter_table(self, adapted: Sequence[AdaptedTokens], total: int) -> "array[int] | None":
        """What `Adapter` in `layers.cpp` is; None where factors are not as the C++ op reads them."""
        table = array("q")
        for tokens, adapter in adapted:
            factors = self._factors(adapter)
            if factors is None:
                return None
            place = (0, total) if tokens is None else (tokens.data_ptr(), len(tokens))
            table.extend((*place, factors.buffer_info()[0]))
        return table

    def _wanted(self, tokens: Tensor, rows: PagedRows, adapted: Sequence[AdaptedTokens]) -> "_Wanted | None":
        some = _adapted_among(tokens, adapted)
        adapters = self._adapter_table(some, len(tokens))
        return None if adapters is None else _Wanted(tokens, rows.alone(tokens), some, adapters)

    def _factors(self, adapter: StackFactors) -> "array[int] | None":
        if adapter not in self._adapters:
            self._adapters[adapter] = _factor_table(adapter, len(self._stack.layers))
        return self._adapters[adapter]


class _Wanted:
    """`Wanted` in `layers.cpp`: the tokens that the last layer goes on with. Holds what it has the addresses of."""

    def __init__(
        self, tokens: Tensor, rows: PagedRows, adapted: Sequence[AdaptedTokens], adapters: "array[int]"
    ) -> None:
        """`rows` are those of these tokens alone, and so are `adapted`, whose table `adapters` is."""
        self._held = tokens, rows, adapted, adapters
        places = tokens.data_ptr(), len(tokens), rows.tables.data_ptr(), rows.extents.data_ptr()
        self._table = array("q", (*places, adapters.buffer_info()[0], len(adapted)))

    @property
    def address(self) -> int:
        return self._table.buffer_info()[0]


def _adapted_among(tokens: Tensor, adapted: Sequence[AdaptedTokens]) -> list[AdaptedTokens]:
    """The same adapters for some of the batch's tokens, by their number among these."""
    chosen = [
        AdaptedTokens(None if those is None else torch.isin(tokens, those).nonzero().flatten(), adapter)
        for those, adapter in adapted
    ]
    return [one for one in chosen if one.tokens is None or len(one.tokens)]


def _factor_table(adapter: StackFactors, layers: int) -> "array[int] | None":
    table = array("q", bytes(8 * layers * len(PLACES)))
    for (layer, name), factors in adapter.places.items():
        if not isinstance(factors, LoraLayout):
            return None
        table[layer * len(PLACES) + PLACES.index(name)] = factors.address
    return table


def _layer(layer: LayerWeights, op_of: OpOf) -> Iterator[int]:
    """As `Layer` in `layers.cpp`."""
    for linear in layer.linears:
        yield from _linear(linear, op_of)
    for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm):
        yield address(norm)
    gate_up = layer.linears[2].weight
    yield layer.window or 0
    yield -1 if layer.rope is None else layer.rope
    yield not isinstance(gate_up, Tiles) or gate_up.shape[0] % (2 * TILE) == 0


def _linear(linear: LinearWeights, op_of: OpOf) -> Iterator[int]:
    """As `Weight` in `layers.cpp`."""
    op, tensors = op_of(linear.weight)
    yield ctypes.cast(op, ctypes.c_void_p).value or 0
    yield linear.weight.shape[1]
    yield linear.weight.shape[0]
    yield len(tensors)
    yield from (*(tensor.data_ptr() for tensor in tensors), *(0 for _ in range(_TENSORS - len(tensors))))
    yield address(linear.bias)
