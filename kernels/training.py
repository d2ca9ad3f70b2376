"""The reference ops with backward passes of their own.

Autograd's backward of the small ops reads and writes the activations more often than needed: here each is written
straight into its place. Values are those of the reference, up to rounding; only float32 takes these ways.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantised import LastFactor, QuantisedWeight, Weight, linear_dequantised
from kernels.reference import ReferenceOps


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of R rows that each predict a token."""

    loss: Tensor
    """[R] float32, nats."""
    correct: Tensor
    """[R] bool: True where the target was the likeliest token."""
    grad: Tensor | None
    """[R, in]: gradient of the sum of losses times shares with respect to the rows; None without shares."""


@dataclass(frozen=True, eq=False)
class KnownOutput:
    """The output of a linear that was computed before."""

    y: Tensor | None
    """[T, out], with the bias and what adapters add; None where what follows does not look at it."""


class TrainingOps(ReferenceOps):
    """For training: every op differentiable, the frequent ones with fewer temporaries."""

    name = "training"
    quantises_inputs = False

    def __init__(self) -> None:
        super().__init__()
        self._last_factor = LastFactor()
        self._known: KnownOutput | None = None

    def knowing(self, known: "KnownOutput") -> "TrainingOps":
        """The same ops, of which `linear` computes nothing but gradients."""
        ops = copy.copy(self)
        ops._known = known
        return ops

    @property
    def packs(self) -> bool:
        """True if `packed_attention` of many sequences is one piece of work, and not one for each."""
        return False

    def lacks_factor(self, weight: Weight, dtype: torch.dtype) -> bool:
        """True if the next `linear` with this weight makes it float first: `make_factor` does so ahead of it."""
        return isinstance(weight, QuantisedWeight) and not self._last_factor.has(weight, dtype)

    def make_factor(self, weight: Weight, dtype: torch.dtype) -> None:
        if isinstance(weight, QuantisedWeight):
            self._last_factor.of(weight, dtype)

    def fuses_loss(self, hidden: Tensor) -> bool:
        """True if `linear_cross_entropy` of such rows keeps the logits out of memory, and so should be used."""
        return False

    def linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Weight,
        targets: Tensor,
        shares: Tensor | None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> TokenLosses:
        """Cross-entropy of softmax(logits) with targets [R], and the gradient of its sum over the rows, each times its
        share ([R] float32), without autograd.

        hidden [R, in], normed already; weight [vocab, in]; a logit is scale times their product, and with a softcap c
        above 0 it is c * tanh(logit / c). Without shares there is no gradient.
        """
        leaf = hidden.detach().requires_grad_(shares is not None)
        with torch.set_grad_enabled(shares is not None):
            logits = self.linear(leaf, weight).float() * scale
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            loss = F.cross_entropy(logits, targets, reduction="none")
        grad = None if shares is None else torch.autograd.grad((loss * shares).sum(), leaf)[0]
        return TokenLosses(loss.detach(), logits.argmax(-1) == targets, grad)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if self._known is not None:
            return self._known_linear(x, weight, self._known)
        if isinstance(weight, QuantisedWeight):
            return linear_dequantised(x, weight, bias, self._last_factor)
        return F.linear(x, weight, bias)

    def _known_linear(self, x: Tensor, weight: Weight, known: "KnownOutput") -> Tensor:
        y = x.new_zeros(()).expand(len(x), weight.shape[0]) if known.y is None else known.y
        found: Tensor = _KnownLinear.apply(x, weight, y, self._last_factor)  # type: ignore[no-untyped-call]
        return found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is not torch.float32 or weight.requires_grad:
            return super().rms_norm(x, weight, eps)
        normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype is not torch.float32:
            return super().silu_mul(gate_up)
        product: Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
        return product

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if 2 * cos.shape[-1] != x.shape[-1]:
            return super().rope(x, cos, sin)
        rotated: Tensor = _Rope.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))  # type: ignore[no-untyped-call]
        return rotated


class _KnownLinear(torch.autograd.Function):
    """x W^T, which is y; no gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, y: Tensor, last: LastFactor) -> Tensor:
        ctx.weight, ctx.last = weight, last
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), weight = grads, ctx.weight
        if isinstance(weight, QuantisedWeight):
            return weight.turned_back(grad @ ctx.last.of(weight, grad.dtype)), None, None, None
        return grad @ weight, None, None, None


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / rms(x); dx = r (g w - x r² mean(g w x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (x * inverse).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        scaled = grads[0] * weight
        mean = torch.linalg.vecdot(scaled, x).unsqueeze(-1).div_(x.shape[-1])
        return scaled.addcmul_(x, mean.mul_(inverse.square()), value=-1).mul_(inverse), None, None


class _SiluMul(torch.autograd.Function):
    """silu(gate) up; both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, dim=-1)
        found = torch.empty_like(gate_up)
        grad_gate, grad_up = found.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return found


class _Rope(torch.autograd.Function):
    """A rotation; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=high).addcmul_(first, sin, value=direction)
    return out


# -- given gradients -------------------------------------------------------------------------------
#
# Backward passes that begin with given gradients. torch imports sympy the first time that it is given gradients:
# 0.6 s of the engine's thread, in which no request gets a token, and 35 MB that stay. A backward pass of a number needs
# none.


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


# -- dropout ---------------------------------------------------------------------------------------
#
# Masks that are a function of their place: what a slice of a micro-batch drops does not depend on the slicing. A
# generator that counts on would have to draw the masks of all tokens for every slice. Here each element is hashed by
# itself: 32-bit multiplications and shifts, as the finalisers of MurmurHash3 and its kin have them.

_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
"""Odd multipliers that spread every bit over the upper ones."""


def dropout_mask(seed: int, rows: slice, columns: Tensor, probability: float) -> Tensor:
    """[rows, C] float32: 0 with probability `probability` (below 1), else 1 / (1 - probability).

    `columns` [C] int32 are the numbers of the columns, `rows` those of the tokens in their micro-batch.
    """
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=columns.device)
    keys = _hashed(_hashed(row + _int32(seed)) + _int32(seed >> 32))
    hashed = _hashed((columns * _int32(_GOLDEN)) + keys.unsqueeze(1))
    keep = hashed >= dropout_threshold(probability)
    return keep.to(torch.float32).div_(1 - probability)


def dropout_threshold(probability: float) -> int:
    """The hash, of 32 bits with a sign, from which on `dropout_mask` keeps a value."""
    return round(probability * 2**32) - 2**31


def _hashed(x: Tensor) -> Tensor:
    """The elements of x, int32, mixed in place: different ones stay different."""
    for shift, multiplier in ((16, _FIRST), (15, _SECOND)):
        x ^= (x >> shift).bitwise_and_(2 ** (32 - shift) - 1)  # the shift of an unsigned number
        x *= _int32(multiplier)
    return x


def _int32(value: int) -> int:
    """The lower 32 bits as a signed number."""
    return (value + 2**31) % 2**32 - 2**31
