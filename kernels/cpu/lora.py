"""Adapters' factors as the C++ op reads them, and its call for a mixed batch."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.batch import LoraFactors, LoraSegment
from kernels.cpu.declarations import declared

_STRUCTS = declared().structs
_LoraPart, _LoraView, _LoraTokens = _STRUCTS["LoraPart"], _STRUCTS["LoraView"], _STRUCTS["LoraTokens"]


@dataclass(frozen=True, eq=False)
class LoraLayout(LoraFactors):
    """Factors whose every B lies rank by rank, so that one vector holds many outputs."""

    view: Any
    """Pointer to the `LoraView` of these tensors; keeps its parts alive, but not the tensors."""

    @classmethod
    def of(cls, factors: LoraFactors) -> "LoraLayout":
        """For float32 on the CPU."""
        a, scales = factors.a.contiguous(), factors.scales.contiguous()
        transposed = [b.t().contiguous() for b in factors.b]
        parts = (_LoraPart * len(transposed))()
        for part, b, column in zip(parts, transposed, factors.columns, strict=True):
            part.b, part.column = b.data_ptr(), column
            part.rank, part.out_features = b.shape
        view = _LoraView(a=a.data_ptr(), scales=scales.data_ptr(), rank=len(a), parts=parts, num_parts=len(parts))
        return cls(a, tuple(b.t() for b in transposed), factors.columns, scales, ctypes.pointer(view))


def suits(factors: LoraFactors) -> bool:
    """True if the C++ op can take these factors."""
    return all(
        tensor.dtype is torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad
        for tensor in (factors.a, factors.scales, *factors.b)
    )


def laid_out(segments: Sequence[LoraSegment]) -> Sequence[LoraSegment] | None:
    """The segments, all with a `LoraLayout`; None where one does not suit. Those of a server have it already."""
    if all(type(segment.factors) is LoraLayout for segment in segments):
        return segments
    if not all(suits(segment.factors) for segment in segments):
        return None
    return [LoraSegment(segment.tokens, LoraLayout.of(segment.factors)) for segment in segments]


def segment_table(tokens: int, segments: Sequence[LoraSegment]) -> Any:
    """Array of `LoraTokens`, for a batch of `tokens` tokens and segments that are `laid_out`."""
    table: Any = (_LoraTokens * len(segments))()
    for index, (own, factors) in enumerate(segments):
        assert isinstance(factors, LoraLayout)
        # A tuple, in the order of the fields, is faster than setting them one by one.
        table[index] = (None, tokens, factors.view) if own is None else (own.data_ptr(), own.shape[0], factors.view)
    return table
