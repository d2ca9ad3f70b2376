"""Adapters' factors as the C++ op reads them, and its call for a mixed batch."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.interface import LoraFactors, LoraSegment


@dataclass(frozen=True, eq=False)
class LoraLayout(LoraFactors):
    """Factors whose every B lies rank by rank, so that one vector holds many outputs."""

    layout: "array[int]"
    """What `Factors` in `lora.cpp` is: addresses of `a` and `scales`, all ranks, parts, and of each part the address
    of its B, its rank, outputs and first column."""
    address: int
    """Of `layout`."""

    @classmethod
    def of(cls, factors: LoraFactors) -> "LoraLayout":
        """For float32 on the CPU."""
        a, scales = factors.a.contiguous(), factors.scales.contiguous()
        turned = [b.t().contiguous() for b in factors.b]
        layout = array("q", (a.data_ptr(), scales.data_ptr(), len(a), len(turned)))
        for b, column in zip(turned, factors.columns, strict=True):
            layout.extend((b.data_ptr(), *b.shape, column))
        address, _ = layout.buffer_info()
        return cls(a, tuple(b.t() for b in turned), factors.columns, scales, layout, address)


def suits(factors: LoraFactors) -> bool:
    """Whether the C++ op can take these."""
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


def segment_table(tokens: int, segments: Sequence[LoraSegment]) -> "array[int]":
    """What `Segment` in `lora.cpp` is, for a batch of so many tokens and segments that are `laid_out`."""
    table = array("q")
    for segment in segments:
        factors, own = segment.factors, segment.tokens
        assert isinstance(factors, LoraLayout)
        table.extend((0, tokens, factors.address) if own is None else (own.data_ptr(), len(own), factors.address))
    return table
