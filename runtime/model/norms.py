"""The norms of the decoder: each has `parameters`, by name, and maps x [T, size] to the same shape.

`then_linear` is what nearly always follows a norm: backends do both at once where the norm is RMSNorm.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels import Ops, Weight
from runtime.workers.group import Group
from runtime.workers.layers import Parameter
from runtime.workers.split import Split


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


class SplitRMSNorm(Norm):
    """`RMSNorm` of values [T, size] that ranks hold parts of: their squares are added up over all of them."""

    def __init__(self, held: Split, eps: float, *, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        self.eps = eps
        self._group = group
        self._counted = held.full * held.copies(group.size)
        """Values on all ranks: where heads are copied, more than there are."""
        self.weight = Parameter({"": held}, (), dtype, device)
        self.parameters = {"weight": self.weight}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        wide = x.float()
        squares = self._group.share(wide.square().sum(-1, keepdim=True))
        return self.weight.data * (wide * torch.rsqrt(squares / self._counted + self.eps)).to(x.dtype)


class PerHeadLayerNorm(Norm):
    """A layer norm of every head with a weight of its own and no bias, of x [T * heads, head_dim]; `heads` are those
    that are held here."""

    def __init__(self, heads: Split, head_dim: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self._shape = (heads.size, head_dim)
        held = {head for part in heads.ranges for head in part}
        parts = {str(h): Split.whole(head_dim) if h in held else Split(head_dim, ()) for h in range(heads.full)}
        self.weight = Parameter(parts, (), dtype, device)
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
