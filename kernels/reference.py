"""The ops in plain torch: differentiable, on any device, and the oracle of the other backends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cache
from kernels.batch import LoraSegment, LoraTable, PagedRows
from kernels.interface import Ops
from kernels.quantised import Int8Weight, QuantisedWeight, Weight, int8_sums, linear_quantised
from kernels.sampling import sample

TRANSPOSED = range(12, 37)
"""Numbers of rows for which MKL computes the transposed product a fifth faster, but for weights as large as a
vocabulary's."""
LARGE = 1 << 24


class ReferenceOps(Ops):
    """Every op in plain torch."""

    name = "reference"

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantisedWeight):
            return linear_quantised(x, weight, bias)
        if len(x) in TRANSPOSED and weight.numel() < LARGE and x.device.type == "cpu":
            y = torch.mm(weight, x.t()).t()
            return y if bias is None else y + bias
        return F.linear(x, weight, bias)

    def int8_sums(self, turned: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
        return int8_sums(turned, weight, most)

    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        for segment in segments:
            tokens, factors = segment.tokens, segment.factors.plain()
            shrunk = F.linear(x if tokens is None else x.index_select(0, tokens), factors.a) * factors.scales
            ranks = [b.shape[1] for b in factors.b]
            for narrow, b, column in zip(torch.split(shrunk, ranks, dim=-1), factors.b, factors.columns, strict=True):
                target = y[:, column : column + len(b)]
                if tokens is None:
                    target.addmm_(narrow, b.t())
                else:
                    target.index_add_(0, tokens, F.linear(narrow, b))
        return y

    def lora_apply_table(self, x: Tensor, y: Tensor, table: LoraTable, adapters: Tensor) -> Tensor:
        for number, factors in enumerate(table.held):
            if factors is not None:
                applied = self.lora_apply(x, y.clone(), [LoraSegment(None, factors)])
                y.copy_(torch.where((adapters == number).unsqueeze(1), applied, y))
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * (1.0 + weight.float())).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.gelu(gate, tanh=tanh) * up

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def moe(self, x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():  # in ascending order: every token adds its experts in one order
            token, place = torch.where(chosen == expert)
            found = F.linear(self.silu_mul(F.linear(x[token], gate_up[expert])), down[expert])
            out = out.index_add(0, token, found * shares[token, place].unsqueeze(1))
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        if half == 0:
            return x
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

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
        heads = q.shape[1]
        q, k = self.rope(torch.cat((q, k), dim=1), cos, sin).tensor_split((heads,), dim=1)
        cache.write(k_cache, slots, k)
        cache.write(v_cache, slots, v)
        return q, k

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
        out = torch.empty_like(q)
        for group in rows.groups.decode:
            # The query heads that share a key/value head are laid out as if they were positions, so
            # that one batched call serves all rows and no key is repeated.
            count, heads, dim = group.blocks.shape[0], k_cache.shape[2], q.shape[-1]
            part = slice(group.start, group.start + count)
            keys = _gather(k_cache, group.blocks, q.dtype)
            values = _gather(v_cache, group.blocks, q.dtype)
            query = q[part].view(count, heads, -1, dim)
            found = _attend(query, keys, values, _windowed(group.mask, window), scale, softcap)
            out[part] = found.reshape(count, -1, dim)
        for row in rows.groups.prefill:
            part = slice(row.start, row.start + row.count)
            if row.mask is None and k_cache.dtype is k.dtype:
                out[part] = self.packed_attention(
                    q[part], k[part], v[part], [row.count], scale, window=window, softcap=softcap
                )
                continue
            total = row.context + row.count
            mask = None if row.mask is None else _windowed(row.mask, window)
            if mask is None and (softcap or window is not None):
                mask = _windowed(torch.ones(total, total, dtype=torch.bool, device=q.device).tril(), window)
            found = _attend(
                q[part].transpose(0, 1).unsqueeze(0),
                _gather(k_cache, row.blocks.unsqueeze(0), q.dtype)[:, :, :total],
                _gather(v_cache, row.blocks.unsqueeze(0), q.dtype)[:, :, :total],
                mask,
                scale,
                softcap,
            )
            out[part] = found.squeeze(0).transpose(0, 1)
        return out

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
        parts = []
        for q1, k1, v1 in zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True):
            mask = None
            if softcap or (window is not None and window < len(q1)):
                causal = torch.ones(len(q1), len(q1), dtype=torch.bool, device=q.device).tril()
                mask = _windowed(causal, window)
            q1, k1, v1 = (x.transpose(0, 1).unsqueeze(0) for x in (q1, k1, v1))
            parts.append(_attend(q1, k1, v1, mask, scale, softcap).squeeze(0).transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, index = logits.max(dim=-1)
        return best, index

    def sample(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
    ) -> Tensor:
        return sample(logits, uniform, temperature, top_k, top_p, min_p)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """q [R, H, n, D], k and v [R, G, m, D], H a multiple of G; no mask means causal with n = m → [R, H, n, D]."""
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    assert mask is not None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    return scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v


def _windowed(mask: Tensor, window: int | None) -> Tensor:
    """A causal mask [..., keys] without tokens a window or more before: the mask moved by a window marks those."""
    if window is None or window >= mask.shape[-1]:
        return mask
    return mask & ~F.pad(mask[..., window:], (0, window))


def _gather(stored: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """stored [N, B, G, width], blocks [R, n] → [R, G, n * B, D], a view of one gathered copy."""
    found = cache.read(stored.index_select(0, blocks.reshape(-1)), dtype)
    return found.view(len(blocks), -1, *found.shape[2:]).transpose(1, 2)
