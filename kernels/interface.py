"""The op interface that every backend fills.

Shapes: T tokens of a flat batch, R rows (sequences), H query heads, G key/value heads (H a multiple
of G), D head_dim, B block_size, N blocks of the KV cache. Activations are float32 or bfloat16.
Ops without "in place" in their docstring are differentiable in the reference backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, with contexts of similar length, next to each other in the batch."""

    start: int
    """Index of the first of them in the flat batch."""
    blocks: Tensor
    """[rows, max_blocks] int64 block ids, padded with block 0."""
    mask: Tensor
    """[rows, 1, 1, max_blocks * B] bool, True where there is a token to attend to."""


@dataclass(frozen=True)
class PrefillRow:
    """One sequence's run of several tokens."""

    start: int
    """Index of its first token in the flat batch."""
    count: int
    context: int
    """Tokens before these that are in the cache already."""
    blocks: Tensor
    """[ceil((context + count) / B)] int64 block ids; used when there is a context."""
    mask: Tensor | None
    """[count, context + count] bool causal mask; None without a context (plain causal)."""


@dataclass(frozen=True)
class PagedRows:
    """How a flat batch lies over the paged cache: built once a step, used in every layer."""

    slots: Tensor
    """[T] int64: block_id * B + offset of every token's place in the cache."""
    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One adapter's low-rank factors for one linear, all its adapted parts together. Built when it is loaded."""

    a: Tensor
    """[R, in]: every part's A, one below the other, R the sum of their ranks; so one product shrinks for all."""
    b: tuple[Tensor, ...]
    """Every part's B, each [out of the part, its rank]."""
    columns: tuple[int, ...]
    """Where each part begins in the linear's output."""
    scales: Tensor
    """[R]: the scale of the part that each row of `a` belongs to."""


@dataclass(frozen=True, eq=False)
class LoraSegment:
    """The tokens of a batch that one adapter is for."""

    tokens: Tensor | None
    """[n] int64, ascending indices into the flat batch; None: all of it."""
    factors: LoraFactors


class Ops(ABC):
    """One backend. Stateless: the same inputs give the same outputs."""

    name: str

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Why this backend cannot run here, or None when it can."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times weight [out, in] transposed, plus bias [out] → [T, out]."""

    @abstractmethod
    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        """In place: add each segment's `(scales * x A^T) B^T` to its tokens' rows of y [T, out], part by part;
        x [T, in]. No token is in two segments. Returns y (arXiv:2106.09685, arXiv:2310.18547)."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] over its root mean square, in float32, times weight [hidden] (arXiv:1910.07467)."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * inner], gate then up → silu(gate) * up, [T, inner] (SwiGLU, arXiv:2002.05202)."""

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, heads, D] by position, first half paired with second; cos, sin [T, D/2].
        Source: arXiv:2104.09864, in Hugging Face's layout."""

    @abstractmethod
    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q [T, H, D] and k [T, G, D]; write k and v in place into the caches [N, B, G, D] at
        `slots` [T]. Returns the rotated q and k."""

    @abstractmethod
    def paged_attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, scale: float
    ) -> Tensor:
        """Causal grouped-query attention of q [T, H, D] over each row's cached tokens, the new ones
        (k, v [T, G, D], already in the cache too) included → [T, H, D] (arXiv:2309.06180)."""

    @abstractmethod
    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        """Causal attention without a cache, for sequences of `lengths` packed one after the other.
        q [T, H, D], k and v [T, G, D], sum(lengths) = T → [T, H, D]."""

    @abstractmethod
    def sample(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
    ) -> Tensor:
        """One token a row, by inverting the distribution function at a given point.

        logits [R, vocab] float32; all others [R]: uniform in [0, 1) float64, temperature above 0
        float32, top_k int64 (vocab for no limit), top_p float32 (1 for no limit), min_p float32
        (0 for none). The filters apply in the order min_p, top_k, top_p to the tempered
        distribution. A row's token depends on that row alone. → [R] int64.
        """
