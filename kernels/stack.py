"""All layers of a decoder as Llama has them, for backends that run them at once: then a step costs one call, and not
six a layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kernels.interface import LoraFactors, PagedRows
from kernels.quantised import Weight

PLACES = ("qkv", "out", "gate_up", "down")
"""A layer's linears, in the order in which they run."""


class LinearWeights(NamedTuple):
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
    """Which of the tables of angles turns queries and keys; None: none does."""


@dataclass(frozen=True, eq=False)
class LayerStack:
    layers: tuple[LayerWeights, ...]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    """Of all norms."""
    scale: float
    """Of attention scores, and `softcap` what they are bent to stay below (0: not), as in `Ops.paged_attention`."""
    softcap: float


@dataclass(frozen=True, eq=False)
class StackFactors:
    """One adapter's factors, by layer and linear (`PLACES`)."""

    places: Mapping[tuple[int, str], LoraFactors]


class AdaptedTokens(NamedTuple):
    """The tokens of a batch that an adapter is for."""

    tokens: Tensor | None
    """[n] int64, ascending; None: all of the batch."""
    adapter: StackFactors


class Layers(ABC):
    """A `LayerStack` that is ready to run: gives the bits that the same ops give one by one."""

    @abstractmethod
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
        """hidden [T, hidden] → [T, hidden] after the last layer, or [n, hidden] of the tokens `wanted` [n] int64,
        ascending. cos, sin [tables, T, R / 2]; `caches` are each layer's keys and values [N, B, G, width], into which
        the new ones are written. No token is in two of `adapted`. None where these cannot be taken at once, and nothing
        has been done."""
