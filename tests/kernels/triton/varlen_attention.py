"""`flash_attn_varlen_func` of the package flash-attn in plain torch, with the checks of its arguments.

From its docstring and the checks of `mha_varlen_fwd` in flash-attn 2.7.
"""

import torch
from torch import Tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert not return_attn_probs
    assert q.dtype is k.dtype is v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dim() == 3
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert k.shape == v.shape
    assert k.shape[-1] == q.shape[-1]
    assert q.shape[1] % k.shape[-2] == 0
    sequences = len(cu_seqlens_q) - 1
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype is torch.int32
        assert ends.is_contiguous()
        assert len(ends) == sequences + 1
        assert ends[0] == 0
    assert cu_seqlens_q[-1] == len(q)
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    if block_table is None:
        assert k.dim() == 3
        assert cu_seqlens_k[-1] == len(k)
    else:
        assert k.dim() == 4
        assert k.shape[1] % 256 == 0
        assert block_table.dtype is torch.int32
        assert block_table.stride(-1) == 1
        assert len(block_table) == sequences
        assert block_table.shape[1] * k.shape[1] >= max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = []
    for index in range(sequences):
        first, last = cu_seqlens_q[index : index + 2].tolist()
        begin, end = cu_seqlens_k[index : index + 2].tolist()
        if block_table is None:
            keys, values = k[begin:end], v[begin:end]
        else:
            keys, values = (x[block_table[index].long()].flatten(0, 1)[: end - begin] for x in (k, v))
        parts.append(_attend(q[first:last], keys, values, scale, causal, window_size, softcap))
    return torch.cat(parts)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """The query at i sees keys from i + m - n - left to i + m - n + right; causal: right is 0."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - torch.arange(len(q)).unsqueeze(1) - (len(k) - len(q))
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).to(q.dtype)
