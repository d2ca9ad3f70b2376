"""The norms of the decoder: each has `parameters`, by name, and maps x [T, size] to the same shape.

A norm also runs together with the linear after it (`norm_linear`, `norm_swiglu`): backends fuse these where the norm is
RMSNorm and no adapter needs the normed values.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels import Ops
from runtime.model.group import Group
from runtime.model.layers import Adapt, Linear, Parameter
from runtime.model.split import Split


class Norm(ABC):
    """Normalises over the last dimension, token by token."""

    parameters: dict[str, Parameter]

    @abstractmethod
    def __call__(self, ops: Ops, x: Tensor) -> Tensor: ...

    def norm_linear(self, ops: Ops, x: Tensor, linear: Linear, adapt: Adapt | None = None) -> Tensor:
        """The linear's output for the normed x: [T, size] → [T, out]."""
        return linear(ops, self(ops, x), adapt)

    def norm_swiglu(self, ops: Ops, x: Tensor, linear: Linear, adapt: Adapt | None = None) -> Tensor:
        """`Ops.silu_mul` of `norm_linear`: [T, size] → [T, out / 2]."""
        return ops.silu_mul(self.norm_linear(ops, x, linear, adapt))


class _Weighted(Norm):
    """A norm with a weight [size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = Parameter({"": size}, (), dtype, device)
        self.parameters = {"weight": self.weight}


class RMSNorm(_Weighted):
    """x over its root mean square, times a weight."""

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.data, self.eps)

    def norm_linear(self, ops: Ops, x: Tensor, linear: Linear, adapt: Adapt | None = None) -> Tensor:
        if adapt is not None or not linear.fuses_norm:
            return super().norm_linear(ops, x, linear, adapt)
        return ops.norm_linear(x, self.weight.data, self.eps, *linear.tensors)

    def norm_swiglu(self, ops: Ops, x: Tensor, linear: Linear, adapt: Adapt | None = None) -> Tensor:
        if adapt is not None or not linear.fuses_norm:
            return super().norm_swiglu(ops, x, linear, adapt)
        return ops.norm_swiglu(x, self.weight.data, self.eps, *linear.tensors)


class RMSNormPlusOne(_Weighted):
    """x over its root mean square, times one plus a weight: Gemma's."""

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
    """`RMSNorm` of values [T, size] that are split over ranks: the squares are summed over all ranks."""

    def __init__(self, held: Split, eps: float, *, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        self.eps = eps
        self._group = group
        self._counted = held.full * held.copies(group.size)
        """Number of values on all ranks: where heads are copied, more than the full size."""
        self.weight = Parameter({"": held}, (), dtype, device)
        self.parameters = {"weight": self.weight}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        wide = x.float()
        squares = self._group.share(wide.square().sum(-1, keepdim=True))
        return self.weight.data * (wide * torch.rsqrt(squares / self._counted + self.eps)).to(x.dtype)


class PerHeadLayerNorm(Norm):
    """A layer norm of every head with a weight of its own and no bias, of x [T * heads, head_dim]; `heads` are the ones
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
"""Value of `DecoderSpec.norm` → class."""
