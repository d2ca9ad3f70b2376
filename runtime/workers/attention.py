"""The two ways in which the decoder attends: over the paged cache (serving), and without one (training).

The decoder hands unrotated queries, keys and values to whichever it was given; it does not know which. What
layers differ in (window, rope) is read from the spec by the layer's index.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels import AdaptedTokens, Layers, Ops, PagedRows
from runtime.workers.kv_cache import KVCache
from runtime.workers.spec import DecoderSpec, LayerSpec


class Attention(Protocol):
    """Called once a layer with q [T, H, D] and k, v [T, G, D], before rope, and `Decoder.angles`'s cosines and
    sines [tables, T, R / 2]; returns [T, H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


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

    def through(
        self,
        layers: Layers,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        adapted: Sequence[AdaptedTokens],
        wanted: Tensor | None,
    ) -> Tensor | None:
        """The same for all layers at once, and what lies between: see `Layers`."""
        return layers(hidden, cos, sin, self._cache.layers, self._rows, adapted, wanted)


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


def _table(angles: Tensor, layer: LayerSpec) -> Tensor:
    """The layer's own of [tables, T, R / 2]; [T, 0] for one that is not turned."""
    return angles[0, :, :0] if layer.rope is None else angles[layer.rope]
