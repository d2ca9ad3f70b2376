"""Training on the CPU with C++: attention, rope, norms, SwiGLU, and products of few rows, with their backward passes.

Values and gradients are those of `TrainingOps`, up to rounding. What the C++ ops do not take goes there.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.declarations import Kernels, declared
from kernels.cpu.library import load
from kernels.cpu.ops import CpuOps
from kernels.quantised import QuantisedWeight, Weight, linear_dequantised
from kernels.training import TrainingOps

_PackedSequences = declared().structs["PackedSequences"]

HEAD_MULTIPLE = 16
"""Head dimensions that the C++ attention takes are a multiple of this."""
MOST_ROWS = 96
"""Rows up to which a linear reads the weights as they lie: BLAS packs them first, which pays with more."""


class CpuTrainingOps(TrainingOps):
    """For training beside `CpuOps`."""

    def __init__(self, serving: CpuOps) -> None:
        super().__init__()
        self._serving = serving
        self._lib = load(serving.variant)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if self._known is not None or len(x) > MOST_ROWS:
            return super().linear(x, weight, bias)
        if isinstance(weight, QuantisedWeight):
            return linear_dequantised(x, weight, bias, self._last_factor, self._serving.linear)
        if weight.requires_grad or not _ours(x, weight) or not weight.is_contiguous():
            return super().linear(x, weight, bias)
        y: Tensor = _CpuLinear.apply(x, weight, self._serving)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.requires_grad or not _ours(x, weight) or not weight.is_contiguous():
            return super().rms_norm(x, weight, eps)
        normed: Tensor = _CpuRmsNorm.apply(_rows(x), weight, eps, self._lib)  # type: ignore[no-untyped-call]
        return normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if not _ours(gate_up):
            return super().silu_mul(gate_up)
        product: Tensor = _CpuSiluMul.apply(gate_up.contiguous(), self._lib)  # type: ignore[no-untyped-call]
        return product

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.shape[-1] == 0 or not _ours(x, cos):
            return super().rope(x, cos, sin)
        rotated: Tensor = _CpuRope.apply(_heads(x), cos.contiguous(), sin.contiguous(), self._lib)  # type: ignore[no-untyped-call]
        return rotated

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
        if softcap or q.shape[2] % HEAD_MULTIPLE or not _ours(q, k, v):
            return super().packed_attention(q, k, v, lengths, scale, window=window, softcap=softcap)
        packed = _SequenceLayout(lengths, scale, window or 0, self._lib)
        out: Tensor = _PackedAttention.apply(_heads(q), _heads(k), _heads(v), packed)  # type: ignore[no-untyped-call]
        return out


def _ours(*tensors: Tensor) -> bool:
    """True if the C++ ops can take these."""
    return all(x.dtype is torch.float32 and x.device.type == "cpu" for x in tensors)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with each token in one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class _CpuLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, serving: CpuOps) -> Tensor:
        ctx.weight = weight
        return serving.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.weight, None, None


class _CpuRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, lib: Kernels) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.lib = eps, lib
        y = torch.empty(x.shape)
        lib.eft_rms_norm(
            x.data_ptr(), x.stride(0), *x.shape, weight.data_ptr(), 0.0, eps, y.data_ptr(), torch.get_num_threads()
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad, found = grads[0].contiguous(), torch.empty(x.shape)
        ctx.lib.eft_rms_norm_backward(
            x.data_ptr(),
            x.stride(0),
            *x.shape,
            weight.data_ptr(),
            ctx.eps,
            grad.data_ptr(),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found, None, None, None


class _CpuSiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, lib: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.lib = lib
        rows, inner = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(rows, inner)
        lib.eft_silu_mul(gate_up.data_ptr(), rows, inner, y.data_ptr(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        grad, found = grads[0].contiguous(), torch.empty_like(gate_up)
        ctx.lib.eft_silu_mul_backward(
            gate_up.data_ptr(), *grad.shape, grad.data_ptr(), found.data_ptr(), torch.get_num_threads()
        )
        return found, None


class _CpuRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, lib: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.lib = lib
        return _rotated(lib, x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _rotated(ctx.lib, _heads(grads[0]), *ctx.saved_tensors, back=True), None, None, None


def _rotated(lib: Kernels, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    y = torch.empty(x.shape)
    lib.eft_rope(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        back,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


class _SequenceLayout:
    """Arguments of the C++ attention for one batch, beside queries, keys and values."""

    def __init__(self, lengths: Sequence[int], scale: float, window: int, lib: Kernels) -> None:
        self.lib = lib
        self._ends = torch.tensor([*accumulate(lengths)], dtype=torch.int64)
        self._scale = scale
        self._window = window

    def view(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """`PackedSequences` of these, which must live as long."""
        return _PackedSequences(
            q=q.data_ptr(),
            q_stride=q.stride(0),
            k=k.data_ptr(),
            k_stride=k.stride(0),
            v=v.data_ptr(),
            v_stride=v.stride(0),
            ends=self._ends.data_ptr(),
            sequences=len(self._ends),
            heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=q.shape[2],
            window=self._window,
            scale=self._scale,
        )


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: _SequenceLayout) -> Tensor:
        out, logsums = torch.empty(q.shape), torch.empty(q.shape[1], len(q))
        packed.lib.eft_packed_attention(
            packed.view(q, k, v), out.data_ptr(), logsums.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(q, k, v, out, logsums)
        ctx.packed = packed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, logsums = ctx.saved_tensors
        grad = grads[0].contiguous()
        found = [torch.empty(x.shape) for x in (q, k, v)]
        ctx.packed.lib.eft_packed_attention_backward(
            ctx.packed.view(q, k, v),
            *(x.data_ptr() for x in (out, logsums, grad, *found)),
            torch.get_num_threads(),
        )
        return *found, None
