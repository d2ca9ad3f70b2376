"""DoRA (arXiv:2402.09353) in training: a linear's output under magnitudes, with its backward pass.

The norms of the rows of W + scale * B A count as constants, as in the paper (section 4.3) and in PEFT.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def add_dora(
    y: Tensor,
    base: Tensor,
    x: Tensor,
    columns: Sequence[slice],
    scales: Sequence[float],
    norms: Sequence[Tensor],
    a: Tensor,
    b: Sequence[Tensor],
    m: Sequence[Tensor],
) -> Tensor:
    """y + (m / n - 1) * base + m / n * scale * (x A^T) B^T, [T, out], part by part, each with its own scale and rank.

    y [T, out] contains `base`, which is W x without a bias [T, out], and maybe a residual stream; `norms` are n, of
    each part [out of the part]. With dropout, x is what is left, and `base` its product.
    """
    found: Tensor = _AddDora.apply(y, base, x, columns, scales, norms, a, *b, *m)  # type: ignore[no-untyped-call]
    return found


def pieces_of(stacked: Tensor, b: Sequence[Tensor], dim: int = 0) -> tuple[Tensor, ...]:
    """Views of what lies together of a linear's parts, as many places of `dim` for each as its B [out, rank] has
    ranks."""
    return torch.split(stacked, [up.shape[1] for up in b], dim)


class _AddDora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        base: Tensor,
        x: Tensor,
        columns: Sequence[slice],
        scales: Sequence[float],
        norms: Sequence[Tensor],
        a: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        b, m = factors[: len(columns)], factors[len(columns) :]
        shrunk = x @ a.to(x.dtype).t()
        out, whole = y.clone(), []
        smalls = pieces_of(shrunk, b, dim=1)
        for place, small, up, scale, norm, magnitude in zip(columns, smalls, b, scales, norms, m, strict=True):
            own = base[:, place]
            direction = torch.addmm(own, small, up.to(x.dtype).t(), alpha=scale)
            out[:, place].addcmul_(direction, (magnitude / norm).to(x.dtype)).sub_(own)
            whole.append(direction)
        ctx.save_for_backward(x, shrunk, a, *factors, *whole)
        ctx.columns, ctx.scales, ctx.norms = columns, scales, norms
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, shrunk, a, *rest = ctx.saved_tensors
        count = len(ctx.columns)
        b, m, whole = rest[:count], rest[count : 2 * count], rest[2 * count :]
        grad_base, grad_shrunk = torch.zeros_like(grad), torch.empty_like(shrunk)
        grad_b, grad_m = [], []
        smalls, grad_smalls = pieces_of(shrunk, b, dim=1), pieces_of(grad_shrunk, b, dim=1)
        for index, place in enumerate(ctx.columns):
            part, norm, scale = grad[:, place], ctx.norms[index], ctx.scales[index]
            scaled = part * (m[index] / norm).to(grad.dtype)
            torch.sub(scaled, part, out=grad_base[:, place])
            grad_m.append((part * whole[index]).sum(0).to(norm.dtype).div_(norm))
            torch.mm(scaled, b[index].to(grad.dtype), out=grad_smalls[index])
            grad_smalls[index].mul_(scale)
            grad_b.append((scaled.t() @ smalls[index]).mul_(scale).to(b[index].dtype))
        grad_a = (grad_shrunk.t() @ x).to(a.dtype)
        grad_x = grad_shrunk @ a.to(grad.dtype) if ctx.needs_input_grad[2] else None
        return grad, grad_base if ctx.needs_input_grad[1] else None, grad_x, None, None, None, grad_a, *grad_b, *grad_m
