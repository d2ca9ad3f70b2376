"""The norms of the decoder: each has `parameters`, by name, and maps x [T, size] to the same shape.

`then_linear` is what nearly always follows a norm: backends do both at once where the norm is RMSNorm.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels import Ops, Weight
from runtime.workers.layers import Parameter


class Norm(ABC):
    """Normalises over the last dimension, token by token."""

    parameters: dict[str, Parameter]

    @abstractmethod
    def __call__(self, ops: Ops, x: Tensor) -> Tensor: ...

    def then_linear(self, ops: Ops, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """`linear` of the normed x [T, size], with weight [out, size] and bias [out] → [T, out]."""
        return ops.linear(self(ops, x), weight, bias)


class RMSNorm(Norm):
    """x over its root mean square, times a weight."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Parameter({"": size}, (), dtype, device)
        self.parameters = {"weight": self.weight}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.data, self.eps)

    def then_linear(self, ops: Ops, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return ops.norm_linear(x, self.weight.data, self.eps, weight, bias)


class RMSNormPlusOne(Norm):
    """x over its root mean square, times one plus a weight: Gemma's."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Parameter({"": size}, (), dtype, device)
        self.parameters = {"weight": self.weight}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.rms_norm_plus_one(x, self.weight.data, self.eps)


class LayerNorm(Norm):
    """x less its mean, over its standard deviation, times a weight, plus a bias."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Parameter({"": size}, (), dtype, device)
        self.bias = Parameter({"": size}, (), dtype, device)
        self.parameters = {"weight": self.weight, "bias": self.bias}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight.data, self.bias.data, self.eps)


class Identity(Norm):
    """No norm, where an architecture has none."""

    def __init__(self) -> None:
        self.parameters = {}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return x


class PerHeadLayerNorm(Norm):
    """A layer norm of every head with a weight of its own and no bias, of x [T * heads, head_dim]."""

    def __init__(self, heads: int, head_dim: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self._shape = (heads, head_dim)
        self.weight = Parameter({str(head): head_dim for head in range(heads)}, (), dtype, device)
        self.parameters = {"weight": self.weight}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        normed = ops.layer_norm(x, None, None, self.eps)
        return (normed.view(-1, *self._shape) * self.weight.data.view(self._shape)).view(x.shape)


NORMS: dict[str, type[RMSNorm] | type[RMSNormPlusOne] | type[LayerNorm]] = {
    "rms": RMSNorm,
    "rms_plus_one": RMSNormPlusOne,
    "layer": LayerNorm,
}
"""By `DecoderSpec.norm`."""
