"""Low-rank adaptation (LoRA, arXiv:2106.09685): an adapter, and the interface through which it changes the decoder.

An adapter adds `scale * (x A^T) B^T` to the output of some linears. Ours are fused (query, key and value; gate
and up), and an adapter is made for their parts, so everything here is by part.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from kernels import AdaptedTokens, LoraSegment, Ops
from runtime.model.token_rows import Embed, TokenRows, VocabularyRows
from runtime.support.module_patterns import ModulePattern

V = TypeVar("V")


@dataclass(frozen=True)
class LoraShape:
    """An adapter's hyper-parameters. Names and meaning as in PEFT's `adapter_config.json`."""

    rank: int
    alpha: float
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dora: bool = False
    """Each part has a magnitude (DoRA, arXiv:2402.09353)."""

    def at(self, module: str) -> tuple[int, float]:
        """Rank and scale of the part that this full name means, such as `model.layers.0.self_attn.q_proj`. Raises
        `PatternInvalid` for patterns that cannot be matched."""
        ranks, alphas = self._patterns
        rank = ranks.get(module, self.rank)
        return rank, self.scale(rank, alphas.get(module, self.alpha))

    @cached_property
    def _patterns(self) -> tuple[ModulePattern[int], ModulePattern[float]]:
        return ModulePattern("rank_pattern", self.rank_pattern), ModulePattern("alpha_pattern", self.alpha_pattern)

    def settled(self, modules: Collection[str]) -> "LoraShape":
        """The same ranks and alphas of these modules, by patterns in which the order of keys means nothing: PEFT sorts
        them when it saves."""
        ranks, alphas = self._patterns
        return replace(self, rank_pattern=_settled(ranks, modules), alpha_pattern=_settled(alphas, modules))

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.rslora else rank)

    def doubled(self) -> "LoraShape":
        """Twice the ranks at the same scales."""
        factor = 2**0.5 if self.rslora else 2.0
        return replace(
            self,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )


def _settled(pattern: ModulePattern[V], modules: Collection[str]) -> dict[str, V]:
    """The pattern itself where at most one key matches each module; else a key for each module."""
    keys = {module: pattern.matching(module) for module in modules}
    if all(len(found) < 2 for found in keys.values()):
        return dict(pattern.values)
    return {module: pattern.values[found[0]] for module, found in keys.items() if found}


@dataclass(frozen=True, eq=False)
class LoraPart:
    """The two factors for one part of one linear."""

    part: str
    """As in `Linear.parts`: "q", "k", "v"; "gate", "up"; "" where the linear has one part only."""
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out of the part, rank]"""
    scale: float
    magnitude: Tensor | None = None
    """[out of the part]: the norms that the rows of W + scale * B A are brought to (DoRA); None: they stay as they
    are."""


LoraLayers = dict[tuple[int, str], list[LoraPart]]
"""(layer index, linear name) → the adapted parts of that linear, in the order of `Linear.parts`."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter's weights and hyper-parameters."""

    shape: LoraShape
    layers: LoraLayers
    vocabulary: VocabularyRows | None = None
    """Rows of embedding and head in place of the base's; None: none."""

    @property
    def rank(self) -> int:
        """The largest of its parts' ranks."""
        return max(len(part.a) for parts in self.layers.values() for part in parts)


class Adaptation(ABC):
    """The change that adapters make to a decoder: called after every linear, as attention is called in every layer.

    Serving applies each row's own adapter (`BatchAdaptation`). Training applies the adapter in training. A base model
    has none.
    """

    adapted: Sequence[AdaptedTokens] | None = None
    """The same for a backend that runs all layers in one call; None where that cannot say it, as in training."""

    @abstractmethod
    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        """From the layer's index, the linear's name (`decoder.LINEARS`), its input x [T, in] and its output y [T, out],
        to which a residual stream may have been added, to the adapted output, [T, out]. `base` [T, out] is the output
        without that stream; it may be y itself, and is given where it `rescales`. May change y in place."""

    def embed(self, token_ids: Tensor, embed: Embed) -> Tensor:
        """Embeddings [T, hidden] of token ids [T]; `embed` gives the base's."""
        return embed(token_ids)

    def rescales(self, layer: int, linear: str) -> bool:
        """True if the linear's own output is changed by factors, as DoRA does, and not only added to."""
        return False

    def at(self, layer: int, linear: str) -> "LinearAdaptation":
        """The change to one linear."""
        return LinearAdaptation(self, layer, linear)


@dataclass(frozen=True, eq=False)
class LinearAdaptation:
    """`layers.Adapt` of one linear."""

    adaptation: Adaptation
    layer: int
    linear: str

    @property
    def rescales(self) -> bool:
        return self.adaptation.rescales(self.layer, self.linear)

    def __call__(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        return self.adaptation(self.layer, self.linear, x, y, base)


class BatchAdaptation(Adaptation):
    """Every row's own adapter, in one step of serving. Changes outputs in place; not for training."""

    def __init__(
        self,
        ops: Ops,
        adapted: Sequence[AdaptedTokens],
        embeddings: Sequence[tuple[Tensor | None, TokenRows]] = (),
        *,
        known: int = 0,
    ) -> None:
        """`embeddings`: some tokens of the batch (None: all), and the rows of their adapter. `known`: rows of the
        base's embedding."""
        self._ops = ops
        self._embeddings = embeddings
        self._known = known
        self.adapted: Sequence[AdaptedTokens] = adapted

    def embed(self, token_ids: Tensor, embed: Embed) -> Tensor:
        if not self._embeddings:
            return embed(token_ids)
        hidden = embed(token_ids.clamp(max=self._known - 1))
        for tokens, rows in self._embeddings:
            if tokens is None:
                return rows.replace(token_ids, hidden)
            hidden[tokens] = rows.replace(token_ids[tokens], hidden[tokens])
        return hidden

    def rescales(self, layer: int, linear: str) -> bool:
        return any((layer, linear) in adapter.factors for _, adapter in self.adapted)

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        place = (layer, linear)
        for tokens, adapter in self.adapted:
            if (factors := adapter.factors.get(place)) is not None:
                assert base is not None, "the linear asks `rescales`"
                factors.add(tokens, base, y)
        segments = [
            LoraSegment(tokens, adapter.places[place]) for tokens, adapter in self.adapted if place in adapter.places
        ]
        return self._ops.lora_apply(x, y, segments) if segments else y
