"""The nouns of low-rank adaptation (LoRA, arXiv:2106.09685): what an adapter is, apart from who applies it.

An adapter adds `scale * (x A^T) B^T` to the output of some linears. Ours are fused (query, key and value; gate
and up), and an adapter is made for their parts, so everything here is by part.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LoraShape:
    """What of an adapter is not a weight. Names and meaning as in PEFT's `adapter_config.json`."""

    rank: int
    alpha: float
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.rslora else rank)


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


LoraLayers = dict[tuple[int, str], list[LoraPart]]
"""(layer index, linear name) → the parts of that linear which are adapted, in the order of `Linear.parts`."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter's weights, and how they were made."""

    shape: LoraShape
    layers: LoraLayers

    @property
    def rank(self) -> int:
        """The largest of its parts' ranks."""
        return max(len(part.a) for parts in self.layers.values() for part in parts)
