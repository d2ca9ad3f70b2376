"""All layers of a decoder as Llama has them, for backends that run them in one call: then a step costs one call, and
not six a layer.

`Ops.fuse_layers` chooses: it gets the pass through all layers one by one, and returns that or one that is fused. What
both need of a step, besides the hidden states, is a `ForwardContext`; its `PagedContext` is what serving adds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.batch import LoraFactors, PagedRows
from kernels.quantised import Weight

PLACES = ("qkv", "out", "gate_up", "down")
"""A layer's linears, in the order in which they run."""


class LinearWeights(NamedTuple):
    """Weight and bias of one linear."""

    weight: Weight
    """[out, in]"""
    bias: Tensor | None
    """[out]"""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """RMSNorm, attention, and its output added; RMSNorm, a gated MLP with SiLU, and its output added."""

    attention_norm: Tensor
    """[hidden]"""
    q_norm: Tensor | None
    """[D]: queries are normed head by head; None: they are not."""
    k_norm: Tensor | None
    mlp_norm: Tensor
    """[hidden]"""
    linears: tuple[LinearWeights, LinearWeights, LinearWeights, LinearWeights]
    """`PLACES`: the first gives all of a token's queries, keys and values, the third gates and ups."""
    window: int | None
    """Tokens that a token attends to; None: all before it."""
    rope: int | None
    """Index of the table of angles that turns queries and keys; None: none does."""


@dataclass(frozen=True, eq=False)
class LayerStack:
    """The weights of all layers, and what the fused pass must know of their shapes."""

    layers: tuple[LayerWeights, ...]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    """Epsilon of all norms."""
    scale: float
    """Factor of attention scores; `softcap` bounds them smoothly (0: not at all), as in `Ops.paged_attention`."""
    softcap: float


@dataclass(frozen=True, eq=False)
class OutputFactors:
    """Factors of one linear's outputs, which DoRA has beside its low-rank ones (arXiv:2402.09353). The bias has none:
    y = factor * (W x) + bias."""

    excess: Tensor
    """[out] float32: the factors less 1."""
    bias: Tensor | None
    """[out] float32."""

    def add(self, tokens: Tensor | None, base: Tensor, y: Tensor) -> None:
        """In place: add to y [T, out] what the factors change in `base` [T, out], the linear's output, for these tokens
        ([n] int64; None: all)."""
        some = base if tokens is None else base.index_select(0, tokens)
        some = some.float() if self.bias is None else some.float() - self.bias
        change = some.mul(self.excess).to(y.dtype)
        if tokens is None:
            y.add_(change)
        else:
            y.index_add_(0, tokens, change)


@dataclass(frozen=True, eq=False)
class StackFactors:
    """One adapter's factors, by layer and linear (`PLACES`)."""

    places: Mapping[tuple[int, str], LoraFactors]
    factors: Mapping[tuple[int, str], OutputFactors] = field(default_factory=dict)
    """Where the linear's own outputs are changed."""


class AdaptedTokens(NamedTuple):
    """The tokens of a batch that an adapter is for."""

    tokens: Tensor | None
    """[n] int64, ascending; None: all of the batch."""
    adapter: StackFactors


@dataclass(frozen=True, eq=False)
class KeptLayers:
    """Values that layers make of T tokens of training, kept for their backward pass."""

    memory: Tensor
    """[layers, T * values of a token]: of each layer the parts of `layer`, one after the other."""
    tokens: int
    widths: tuple[int, int, int, int]
    """Values of a token in each part."""

    @classmethod
    def sizes(cls, stack: LayerStack) -> tuple[int, int, int, int]:
        """The `widths` of a stack's layers."""
        qkv, _, gate_up, _ = (linear.weight.shape for linear in stack.layers[0].linears)
        return qkv[1], qkv[0], qkv[1], gate_up[0]

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """[T, width] each: the layer's input; queries, keys and values, normed and before rope; the
        residual stream after attention; gates and ups."""
        parts = torch.split(self.memory[index], [self.tokens * width for width in self.widths])
        return tuple(part.view(self.tokens, -1) for part in parts)


@dataclass(frozen=True, eq=False)
class RidingTokens:
    """The last tokens of a batch of serving, which are of a sequence in training."""

    inputs: Tensor
    """[n, hidden] of the first layer."""
    start: int
    """Place of the first of them in `kept`."""
    kept: KeptLayers
    """Place where the layers write what they make of these tokens."""
    adapter: StackFactors
    dropout: float = 0.0
    """Probability with which an input of the adapter is dropped, by `kernels.training.dropout_mask`."""
    seeds: Mapping[tuple[int, str], int] = field(default_factory=dict)
    """Seeds of the masks by layer and linear."""
    first_row: int = 0
    """Row of the masks of the first token."""

    @property
    def count(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class PagedContext:
    """A batch of serving, as all layers see it."""

    caches: Sequence[tuple[Tensor, Tensor]]
    """Each layer's keys and values [N, B, G, width], into which the new ones are written."""
    rows: PagedRows
    adapted: Sequence[AdaptedTokens] = ()
    """No token is in two of these."""
    riding: RidingTokens | None = None
    """None: no token is of training."""


class ForwardContext(Protocol):
    """A batch of T tokens, as all layers see it."""

    @property
    def cos(self) -> Tensor:
        """[tables, T, R / 2], as `sin`: for each table of angles, those of the tokens' positions."""

    @property
    def sin(self) -> Tensor: ...

    @property
    def logits_indices(self) -> Tensor | None:
        """[n] int64, ascending: the tokens whose hidden states are needed after the last layer. None: all."""

    @property
    def paged(self) -> PagedContext | None:
        """None for attention without a cache, or adapters that the ops do not apply, as in training."""


ContextT = TypeVar("ContextT", bound=ForwardContext)

ForwardLayers = Callable[[Tensor, ContextT], Tensor]
"""A pass through all layers: hidden [T, hidden] → [T, hidden] after the last one, or [n, hidden] of the context's
`logits_indices`."""


class FusedLayers(ABC, Generic[ContextT]):
    """A `LayerStack` that is ready to run in one call, and gives the bits that the same ops give one by one."""

    widths: tuple[int, int, int, int] | None = None
    """`KeptLayers.widths` of layers that take `RidingTokens`; None: they do not."""

    def __init__(self, layer_by_layer: ForwardLayers[ContextT]) -> None:
        """`layer_by_layer`: the same layers for batches that cannot be fused."""
        self._layer_by_layer = layer_by_layer

    def __call__(self, hidden: Tensor, context: ContextT) -> Tensor:
        """A `ForwardLayers`."""
        paged = context.paged
        riding = None if paged is None else paged.riding
        rescaled = paged is not None and any(adapter.factors for _, adapter in paged.adapted)
        if paged is None or rescaled or torch.is_grad_enabled() or not self.takes(hidden, context.cos, paged):
            if riding is not None:
                raise ValueError("the batch has riding tokens, and cannot be computed in one call")
            return self._layer_by_layer(hidden, context)
        return self.forward_fused(hidden, context.cos, context.sin, paged, context.logits_indices)

    @abstractmethod
    def takes(self, hidden: Tensor, cos: Tensor, paged: PagedContext) -> bool:
        """True if types and devices of these, and the adapters' layouts, are those of the fused layers."""

    @abstractmethod
    def forward_fused(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, paged: PagedContext, logits_indices: Tensor | None
    ) -> Tensor:
        """All layers in one call, for a batch that `takes` is true for. Shapes are `ForwardContext`'s."""
