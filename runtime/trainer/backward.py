"""Backward passes that begin with given gradients.

torch imports sympy the first time that it is given gradients: 0.6 s of the engine's thread, in which no request gets a
token, and 35 MB that stay. A backward pass of a number needs none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Seed(torch.autograd.Function):
    """A number whose gradients with respect to some tensors are the given ones."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        """tensors: `count` outputs, and as many gradients."""
        ctx.grads = tensors[count:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None, *ctx.grads, *(None for _ in ctx.grads))


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add to the gradients of all leaves of `outputs`, whose own gradients are `grads`, of the same shapes.

    Raises `ValueError` for a gradient of another shape.
    """
    for output, grad in zip(outputs, grads, strict=True):
        if output.shape != grad.shape:
            raise ValueError(f"a gradient of shape {list(grad.shape)} for an output of {list(output.shape)}")
    seed: Any = _Seed.apply(len(outputs), *outputs, *(grad.detach() for grad in grads))  # type: ignore[no-untyped-call]
    seed.backward()
