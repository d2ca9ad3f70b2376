"""Cross-entropy of a linear over a large vocabulary, with its gradient, and without the logits in memory.

The vocabulary is read twice in chunks of `CHUNK`: once for each row's largest logit and the sum of
exponentials, then, where required, for the gradient, chunk by chunk. Products are cuBLAS's; the steps between
them are here, one program a row (as in arXiv:2410.10989, which cuts up the rows instead).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantised import QuantisedWeight, Weight
from kernels.training import TokenLosses

CHUNK = 8192
"""Logits of a row at once."""
BLOCK = 1024


@triton.jit
def _capped(x, scale, softcap):
    """A logit, and its derivative by the product that it comes from."""
    x = x * scale
    slope = tl.zeros_like(x) + scale
    if softcap > 0.0:
        bent = 2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0
        x = softcap * bent
        slope = slope * (1.0 - bent * bent)
    return x, slope


@triton.jit
def _fold(logits, targets, first, bests, totals, at_targets, size, scale, softcap, BLOCK: tl.constexpr):
    """A chunk's logits into each row's largest, its sum of exp(logit - largest), and its target's logit."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    target = tl.load(targets + row) - first
    best, total, at_target = tl.load(bests + row), tl.load(totals + row), tl.load(at_targets + row)
    for start in range(0, size, BLOCK):
        inside = start + at < size
        x, _ = _capped(tl.load(logits + row * size + start + at, mask=inside, other=0.0).to(tl.float32), scale, softcap)
        x = tl.where(inside, x, float("-inf"))
        larger = tl.maximum(best, tl.max(x, axis=0))
        total = total * tl.exp(best - larger) + tl.sum(tl.exp(x - larger), axis=0)
        at_target += tl.sum(tl.where(start + at == target, x, 0.0), axis=0)
        best = larger
    tl.store(bests + row, best)
    tl.store(totals + row, total)
    tl.store(at_targets + row, at_target)


@triton.jit
def _gradient(logits, targets, first, bests, totals, shares, size, scale, softcap, BLOCK: tl.constexpr):
    """A chunk's logits, overwritten by the gradient of each row's share times its loss."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = logits + row * size + at
    x, slope = _capped(tl.load(place, mask=inside, other=0.0).to(tl.float32), scale, softcap)
    change = tl.exp(x - tl.load(bests + row)) / tl.load(totals + row)
    change = tl.where(at == tl.load(targets + row) - first, change - 1.0, change)
    tl.store(place, (change * tl.load(shares + row) * slope).to(logits.dtype.element_ty), mask=inside)


def linear_cross_entropy(
    hidden: Tensor, weight: Weight, targets: Tensor, shares: Tensor | None, *, scale: float = 1.0, softcap: float = 0.0
) -> TokenLosses:
    """`TrainingOps.linear_cross_entropy`."""
    count, vocab = len(hidden), weight.shape[0]
    bests = torch.full((count,), -torch.inf, device=hidden.device)
    totals, at_targets = torch.zeros_like(bests), torch.zeros_like(bests)
    if not count:
        return TokenLosses(bests, bests > 0, None if shares is None else torch.zeros_like(hidden))
    for first in range(0, vocab, CHUNK):
        logits = F.linear(hidden, _rows(weight, first, hidden.dtype))
        _fold[(count,)](logits, targets, first, bests, totals, at_targets, logits.shape[1], scale, softcap, BLOCK=BLOCK)
    losses, correct = bests + totals.log() - at_targets, at_targets == bests
    if shares is None:
        return TokenLosses(losses, correct, None)
    grad = torch.zeros(hidden.shape, device=hidden.device)
    for first in range(0, vocab, CHUNK):
        part = _rows(weight, first, hidden.dtype)
        logits = F.linear(hidden, part)
        size = logits.shape[1]
        _gradient[(count, triton.cdiv(size, BLOCK))](
            logits, targets, first, bests, totals, shares, size, scale, softcap, BLOCK=BLOCK
        )
        grad += logits @ part
    return TokenLosses(losses, correct, grad.to(hidden.dtype))


def _rows(weight: Weight, first: int, dtype: torch.dtype) -> Tensor:
    """Outputs of a chunk, in floating point."""
    last = min(first + CHUNK, weight.shape[0])
    if isinstance(weight, QuantisedWeight):
        return weight.rows(torch.arange(first, last, device=weight.device)).to(dtype)
    return weight[first:last]
