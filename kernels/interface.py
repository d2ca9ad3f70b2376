"""The op interface that every backend fills.

Shapes: T tokens of a flat batch, R rows (sequences), H query heads, G key/value heads (H a multiple
of G), D head_dim, B block_size, N blocks of the KV cache. Activations are float32 or bfloat16.
Ops without "in place" in their docstring are differentiable in the reference backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.batch import LoraFactors, LoraSegment, LoraTable, PagedRows
from kernels.quantised import Int8Weight, QuantisedWeight, Weight
from kernels.stack import ContextT, ForwardLayers, LayerStack


class Ops(ABC):
    """One backend. Stateless: the same inputs give the same outputs."""

    name: str

    batch_invariant = False
    """True if a row's result is the same bits for any batch and any number of threads, except in `moe`."""

    quantises_inputs = True
    """True if `linear` with a weight in integers quantises its input too, where that needs no gradient."""

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Reason why this backend cannot run here, or None when it can."""

    @property
    def attention(self) -> str:
        """Name of the kernels of `paged_attention`, and why there are no faster ones: for logs."""
        return self.name

    def prepare(self, weight: QuantisedWeight) -> QuantisedWeight:
        """The same weight in this backend's layout. Called once, when it is loaded. Any backend takes the result."""
        return weight

    def prepare_lora(self, factors: LoraFactors, dtype: torch.dtype = torch.float32) -> LoraFactors:
        """The same factors in this backend's layout. Called once, when an adapter is loaded. Any backend takes the
        result. `dtype`: float32, bfloat16 or int8, in which a backend may hold factors that are given in float32."""
        return factors

    def fuse_layers(self, stack: LayerStack, layer_by_layer: ForwardLayers[ContextT]) -> ForwardLayers[ContextT]:
        """The pass through a model's layers, once all weights are there: `layer_by_layer`, which is made of these ops,
        or where the backend has one, `kernels.stack.FusedLayers`."""
        return layer_by_layer

    @abstractmethod
    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times weight [out, in] transposed, plus bias [out] → [T, out]. With a weight in integers
        x is quantised too, token by token; its gradient is that of the dequantised weight."""

    @abstractmethod
    def int8_sums(self, turned: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
        """The integers of `linear` with an int8 weight [out, in], for turned rows [T, ceil(in / 64) * 64] that are
        slices of wider ones (`kernels.hadamard`): [T, out] int32. `most` [T] float32 is the size of each whole row's
        largest turned value. Sums of all slices go into `kernels.quantised.from_sums`."""

    @abstractmethod
    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        """In place: add each segment's `(scales * x A^T) B^T` to its tokens' rows of y [T, out], part by part;
        x [T, in]. No token is in two segments. Returns y (arXiv:2106.09685, arXiv:2310.18547)."""

    @abstractmethod
    def lora_apply_table(self, x: Tensor, y: Tensor, table: LoraTable, adapters: Tensor) -> Tensor:
        """In place: as `lora_apply`, where each token is for the adapter of that number in the table, adapters [T]
        int64. The host reads none of them. Returns y."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] over its root mean square, in float32, times weight [hidden] (arXiv:1910.07467)."""

    @abstractmethod
    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `rms_norm`, but times 1 + weight, all in float32 (Gemma, arXiv:2403.08295)."""

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """x [T, hidden] less its mean, over its standard deviation, times weight, plus bias, each [hidden]
        (arXiv:1607.06450)."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * inner], gate then up → silu(gate) * up, [T, inner] (SwiGLU, arXiv:2002.05202)."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """`linear` of `rms_norm`: x [T, in], norm [in], weight [out, in] → [T, out]."""
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """`silu_mul` of `norm_linear`: weight [2 * inner, in] → [T, inner]."""
        return self.silu_mul(self.norm_linear(x, norm, eps, weight, bias))

    def linear_add(self, residual: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """residual [T, out] + `linear`."""
        return residual + self.linear(x, weight, bias)

    @abstractmethod
    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        """[T, 2 * inner], gate then up → gelu(gate) * up, [T, inner] (GeGLU, arXiv:2002.05202); `tanh`: gelu by
        its approximation."""

    @abstractmethod
    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """gelu(x), any shape (arXiv:1606.08415); `tanh`: by its approximation."""

    @abstractmethod
    def moe(self, x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """A mixture of E gated MLPs, of which every token goes through K (arXiv:2401.04088).

        x [T, hidden]; chosen [T, K] int64 experts and their shares [T, K]; gate_up [E, 2 * inner, hidden], gate
        then up; down [E, hidden, inner] → the sum of share * down(silu(gate) * up), [T, hidden]. The order in
        which a token's experts are added depends on the token alone.
        """

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first R ≤ D dimensions of x [T, heads, D] by position, their first half paired with their
        second; cos, sin [T, R / 2], R may be 0. Source: arXiv:2104.09864, in Hugging Face's layout."""

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
        """Rotate q [T, H, D] and k [T, G, D] as `rope` does; write k and v in place into the caches [N, B, G, width] at
        `slots` [T]: float32, bfloat16 or int8, see `kernels.cache`.
        Returns the rotated q and k, which may lie where they lay before."""

    @abstractmethod
    def paged_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Causal grouped-query attention of q [T, H, D] over each row's cached tokens, the new ones
        (k, v [T, G, D], already in the cache too) included → [T, H, D] (arXiv:2309.06180). Keys and
        values are those of the cache, in its type.

        With a window a token sees that many tokens, itself included. A softcap c above 0 turns every scaled score
        s into c * tanh(s / c)."""

    @abstractmethod
    def packed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        scale: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Causal attention without a cache, for sequences of `lengths` packed one after the other.
        q [T, H, D], k and v [T, G, D], sum(lengths) = T → [T, H, D]; the options are `paged_attention`'s."""

    @abstractmethod
    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [R, vocab] float32 → each row's largest [R], NaN if there is one, and its index [R] int64."""

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
