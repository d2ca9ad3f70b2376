"""The Triton backend: its kernels where tensors are on the GPU and need no gradient, else the reference.

Rows of several tokens are attended to by flash-attn where that is installed and can read the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.batch import LoraSegment, LoraTable, PagedRows
from kernels.quantised import Weight
from kernels.reference import ReferenceOps
from kernels.triton import attention, lora, norms, pointwise, quantised, rope, sampling
from kernels.triton.availability import unavailable
from kernels.triton.flash import BLOCK, FlashAttention
from kernels.triton.launch import takes

CACHE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class TritonOps(ReferenceOps):
    """Products of floats are torch's, cuBLAS by name; so are the ops that have no kernel here."""

    name = "triton"

    def __init__(self, flash: FlashAttention | None = None, without_flash: str = "not asked for") -> None:
        """`without_flash`: reason why there is no `flash`."""
        self.flash = flash
        self._without_flash = without_flash

    @property
    def attention(self) -> str:
        if self.flash is None:
            return f"triton; flash-attn is not used: {self._without_flash}"
        return f"triton; flash-attn for rows of several tokens, in blocks of a multiple of {BLOCK}"

    @classmethod
    def unavailable(cls) -> str | None:
        return unavailable()

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not (isinstance(weight, quantised.TAKEN) and takes(x)):
            return super().linear(x, weight, bias)
        return quantised.linear(x, weight, bias)

    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        factors = [tensor for segment in segments for tensor in (segment.factors.a, *segment.factors.b)]
        if not (takes(x, y, *factors) and lora.fits(x, y, segments)):
            return super().lora_apply(x, y, segments)
        return lora.lora_apply(x, y, segments)

    def lora_apply_table(self, x: Tensor, y: Tensor, table: LoraTable, adapters: Tensor) -> Tensor:
        if not (takes(x, y) and x.dtype is y.dtype):
            return super().lora_apply_table(x, y, table, adapters)
        return lora.lora_apply_table(x, y, table, adapters)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norms.rms_norm(x, weight, eps) if takes(x, weight) else super().rms_norm(x, weight, eps)

    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not takes(x, weight):
            return super().rms_norm_plus_one(x, weight, eps)
        return norms.rms_norm(x, weight, eps, plus_one=True)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return pointwise.gated(gate_up, pointwise.SILU) if takes(gate_up) else super().silu_mul(gate_up)

    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        if not takes(gate_up):
            return super().gelu_mul(gate_up, tanh=tanh)
        return pointwise.gated(gate_up, pointwise.GELU_TANH if tanh else pointwise.GELU)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        if not takes(x):
            return super().gelu(x, tanh=tanh)
        return pointwise.gelu(x, pointwise.GELU_TANH if tanh else pointwise.GELU)

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
        if not (takes(q, k, v, cos) and cached(k_cache, q.shape[2])):
            return super().rope_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots)
        return rope.rope_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots)

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
        if not (takes(q) and cached(k_cache, q.shape[2])):
            return super().paged_attention(q, k, v, k_cache, v_cache, rows, scale, window=window, softcap=softcap)
        if self.flash is None or not self.flash.takes_paged(q, k_cache, rows):
            return attention.paged_attention(q, k_cache, v_cache, rows, scale, window=window, softcap=softcap)
        found = self.flash.paged(q, k_cache, v_cache, rows, scale, window=window, softcap=softcap)
        several = rows.several
        if not several.first:
            return found
        alone = attention.paged_attention(
            q[: several.first], k_cache, v_cache, several.alone, scale, window=window, softcap=softcap
        )
        return torch.cat((alone, found))

    def sample(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
    ) -> Tensor:
        if not (takes(logits) and logits.dtype is torch.float32):
            return super().sample(logits, uniform, temperature, top_k, top_p, min_p)
        return sampling.sample(logits, uniform, temperature, top_k, top_p, min_p)


def cached(stored: Tensor, head_dim: int) -> bool:
    """True if the kernels can read this cache: the scale behind an int8 head must lie where a float32 may."""
    return stored.dtype in CACHE_TYPES and (stored.dtype is not torch.int8 or head_dim % 4 == 0)
