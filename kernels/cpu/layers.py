"""All layers in one call of the C++ op `eft_layers`."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.batch import PagedRows
from kernels.cpu.declarations import Kernels, declared
from kernels.cpu.library import address
from kernels.cpu.lora import LoraLayout
from kernels.cpu.tiles import TILE, Tiles
from kernels.quantised import Weight
from kernels.stack import (
    PLACES,
    AdaptedTokens,
    ContextT,
    ForwardLayers,
    FusedLayers,
    KeptLayers,
    LayerStack,
    LayerWeights,
    PagedContext,
    RidingTokens,
    StackFactors,
)
from kernels.training import dropout_threshold

_DECLARED = declared()
_STRUCTS = _DECLARED.structs
_LayerView, _CacheView, _LoraView = _STRUCTS["LayerView"], _STRUCTS["CacheView"], _STRUCTS["LoraView"]
_AdapterTokens, _OutputTokens = _STRUCTS["AdapterTokens"], _STRUCTS["OutputTokens"]
_LoraDropout, _RidingView = _STRUCTS["LoraDropout"], _STRUCTS["RidingView"]

CACHE_TYPES = {
    dtype: _DECLARED.enums["CacheType"][name]
    for dtype, name in {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.int8: "INT8"}.items()
}
"""Types that the KV cache may hold, each with its number in `exports.h`."""
assert [*map(str.lower, _DECLARED.enums["LinearPlace"])] == [*PLACES]

OpOf = Callable[[Weight], tuple[Any, tuple[int, int, int]]]
"""The C++ linear for a weight, and the addresses of its values, scales and sums for a row of zeros (0: it has none)."""


class CpuLayers(FusedLayers[ContextT]):
    """The layers for the C++ op. Keeps the tensors alive whose addresses the op has."""

    def __init__(self, stack: LayerStack, lib: Kernels, op_of: OpOf, layer_by_layer: ForwardLayers[ContextT]) -> None:
        """For weights that all have a C++ linear, and norms and biases in float32 on the CPU."""
        super().__init__(layer_by_layer)
        self._lib = lib
        self._stack = stack
        self._layers = (_LayerView * len(stack.layers))()
        for view, layer in zip(self._layers, stack.layers, strict=True):
            _fill(view, layer, op_of)
        self._caches: Sequence[tuple[Tensor, Tensor]] = ()
        self._cache_views: Any = None
        self._adapters: WeakKeyDictionary[StackFactors, Any] = WeakKeyDictionary()
        qkv, _, gate_up, _ = (linear.weight for linear in stack.layers[0].linears)
        self._sizes = (qkv.shape[1], gate_up.shape[0] // 2, stack.heads, stack.kv_heads, stack.head_dim)
        self.widths = KeptLayers.sizes(stack)

    def takes(self, hidden: Tensor, cos: Tensor, paged: PagedContext) -> bool:
        if hidden.dtype is not torch.float32 or cos.dtype is not torch.float32:
            return False
        adapters = [adapter for _, adapter in paged.adapted] + ([paged.riding.adapter] if paged.riding else [])
        return self._keeps(paged.caches) and all(self._factors(adapter) is not None for adapter in adapters)

    def forward_fused(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, paged: PagedContext, logits_indices: Tensor | None
    ) -> Tensor:
        stack, rows, adapted, riding = self._stack, paged.rows, [*paged.adapted], paged.riding
        masks = None
        if riding is not None:
            adapted.append(AdaptedTokens(torch.arange(len(hidden) - riding.count, len(hidden)), riding.adapter))
            masks = self._masks(riding)
        adapters = self._adapter_table(adapted, len(hidden), masks)
        # Keeps alive what the struct points to.
        outputs, held = (None, None) if logits_indices is None else self._outputs(logits_indices, rows, adapted, masks)
        view, places = (None, None) if riding is None else _riding_view(riding)
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        cos, sin = cos.contiguous(), sin.contiguous()
        size, inner, heads, kv_heads, head_dim = self._sizes
        self._lib.eft_layers(
            layers=self._layers,
            num_layers=len(stack.layers),
            hidden=size,
            inner=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=stack.eps,
            scale=stack.scale,
            softcap=stack.softcap,
            caches=self._cache_views,
            cache_type=CACHE_TYPES[paged.caches[0][0].dtype],
            x=hidden.data_ptr(),
            tokens=len(hidden),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            half=cos.shape[2],
            slots=rows.slots.data_ptr(),
            tables=rows.tables.data_ptr(),
            table_width=rows.tables.shape[1],
            extents=rows.extents.data_ptr(),
            rows=len(rows.counts),
            block_size=rows.block_size,
            adapters=adapters,
            num_adapters=len(adapted),
            outputs=outputs,
            riding=view,
            threads=torch.get_num_threads(),
        )
        del held, places
        return hidden if logits_indices is None else hidden[: len(logits_indices)]

    def _keeps(self, caches: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Keep an array of `CacheView`. False where the C++ op does not support the caches' type or device."""
        if caches is not self._caches:
            if any(cache.dtype not in CACHE_TYPES or cache.device.type != "cpu" for both in caches for cache in both):
                return False
            self._cache_views = (_CacheView * len(caches))(*(_CacheView(k.data_ptr(), v.data_ptr()) for k, v in caches))
            self._caches = caches
        return True

    def _masks(self, riding: RidingTokens) -> Any:
        """Array of `LoraDropout` by layer and place; None without dropout."""
        if not riding.dropout:
            return None
        table = (_LoraDropout * (len(self._stack.layers) * len(PLACES)))()
        threshold, scale = dropout_threshold(riding.dropout), 1 / (1 - riding.dropout)
        for (layer, name), seed in riding.seeds.items():
            table[layer * len(PLACES) + PLACES.index(name)] = _LoraDropout(seed, riding.first_row, threshold, scale)
        return table

    def _adapter_table(self, adapted: Sequence[AdaptedTokens], total: int, masks: Any = None) -> Any:
        """Array of `AdapterTokens`, for a batch of `total` tokens, of factors that the C++ op can read. `masks` are
        those of the last of them."""
        table = (_AdapterTokens * len(adapted))()
        for entry, (tokens, adapter) in zip(table, adapted, strict=True):
            factors = self._factors(adapter)
            assert factors is not None
            entry.tokens, entry.count = (None, total) if tokens is None else (tokens.data_ptr(), len(tokens))
            entry.factors = factors
        if masks is not None:
            table[len(adapted) - 1].dropout = masks
        return table

    def _outputs(
        self, tokens: Tensor, rows: PagedRows, adapted: Sequence[AdaptedTokens], masks: Any
    ) -> tuple[Any, Any]:
        """`OutputTokens`, and what must live as long."""
        some, alone = _adapted_among(tokens, adapted), rows.alone(tokens)
        outputs = _OutputTokens(
            tokens=tokens.data_ptr(),
            count=len(tokens),
            tables=alone.tables.data_ptr(),
            extents=alone.extents.data_ptr(),
            adapters=self._adapter_table(some, len(tokens), masks),
            num_adapters=len(some),
        )
        return outputs, (alone, some)

    def _factors(self, adapter: StackFactors) -> Any:
        """Array of pointers to `LoraView` by layer and place; None where the C++ op cannot read the factors."""
        if adapter not in self._adapters:
            self._adapters[adapter] = _factor_table(adapter, len(self._stack.layers))
        return self._adapters[adapter]


def _adapted_among(tokens: Tensor, adapted: Sequence[AdaptedTokens]) -> list[AdaptedTokens]:
    """The same adapters for some of the batch's tokens, by their number among these."""
    chosen = [
        AdaptedTokens(None if those is None else torch.isin(tokens, those).nonzero().flatten(), adapter)
        for those, adapter in adapted
    ]
    return [one for one in chosen if one.tokens is None or len(one.tokens)]


def _riding_view(riding: RidingTokens) -> tuple[Any, Any]:
    """`RidingView`, and what must live as long."""
    memory = riding.kept.memory
    first, stride = memory.data_ptr(), memory.stride(0) * memory.itemsize
    to = (ctypes.c_void_p * len(memory))(*(first + layer * stride for layer in range(len(memory))))
    return _RidingView(riding.count, riding.start, riding.kept.tokens, ctypes.addressof(to)), to


def _factor_table(adapter: StackFactors, layers: int) -> Any:
    table = (ctypes.POINTER(_LoraView) * (layers * len(PLACES)))()
    for (layer, name), factors in adapter.places.items():
        if not isinstance(factors, LoraLayout):
            return None
        table[layer * len(PLACES) + PLACES.index(name)] = factors.view
    return table


def _fill(view: Any, layer: LayerWeights, op_of: OpOf) -> None:
    """Write a layer into a `LayerView`."""
    for entry, linear in zip(view.linears, layer.linears, strict=True):
        entry.function, (entry.values, entry.scales, entry.zero_sums) = op_of(linear.weight)
        entry.out_features, entry.in_features = linear.weight.shape
        entry.bias = address(linear.bias)
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
        setattr(view, name, address(getattr(layer, name)))
    gate_up = layer.linears[PLACES.index("gate_up")].weight
    view.window = layer.window or 0
    view.rope = -1 if layer.rope is None else layer.rope
    view.fuses_swiglu = not isinstance(gate_up, Tiles) or gate_up.shape[0] % (2 * TILE) == 0
