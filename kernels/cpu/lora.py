"""Adapters' factors as the C++ op reads them, and its call for a mixed batch."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.batch import LoraFactors, LoraSegment
from kernels.cpu.declarations import declared

_DECLARED = declared()
_STRUCTS = _DECLARED.structs
_LoraBatch, _LoraSpan = _STRUCTS["LoraBatch"], _STRUCTS["LoraSpan"]
_LoraTokens, _LoraView = _STRUCTS["LoraTokens"], _STRUCTS["LoraView"]
_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.int8: "INT8"}
"""Types that factors are held in, each with its name in `exports.h`."""

TILE = 64
"""Outputs of a tile of B."""
LARGEST_INT8 = 127


class _Span(NamedTuple):
    """Tiles `first` to `end` of the outputs, to which parts `parts` add."""

    first: int
    end: int
    parts: range


@dataclass(frozen=True, eq=False)
class LoraLayout(LoraFactors):
    """Factors as the C++ op reads them: `a` [R, in], and one `b`, tile by tile of the outputs, in float32, bfloat16 or
    int8. Integers are so times `scales`. Other ops need `plain`."""

    view: Any
    """Pointer to the `LoraView` of these tensors; keeps its spans alive, but not the tensors."""
    given: tuple[tuple[int, int], ...]
    """Outputs and rank of every part, in the order of `columns`, which is ascending."""

    @classmethod
    def of(cls, factors: LoraFactors, dtype: torch.dtype = torch.float32) -> "LoraLayout":
        """For float32 on the CPU, to be held in `dtype`, one of `_TYPES`: integers have a scale for each rank of A and
        one of B."""
        factors = _by_column(factors)
        reach = factors.reach if factors.reach is not None else _reach_of(factors)
        a, a_scales = _held(factors.a, dtype, reach[0])
        of_parts = torch.split(reach[1], [b.shape[1] for b in factors.b])
        parts = [_held(b.t(), dtype, one) for b, one in zip(factors.b, of_parts, strict=True)]
        scales = factors.scales
        if a_scales is not None:
            scales = scales * a_scales * torch.cat([one for _, one in parts if one is not None])
        shapes = tuple((len(b), b.shape[1]) for b in factors.b)
        spans = _spans(factors.columns, [out for out, _ in shapes])
        b = torch.cat([_tiles(span, [one for one, _ in parts], factors.columns) for span in spans])
        return cls(a, (b,), factors.columns, scales, _view(a, b, scales, spans, factors.columns, shapes), shapes)

    def plain(self) -> LoraFactors:
        tiles, ranks = self.b[0].float(), [rank for _, rank in self.given]
        found = [torch.zeros(rank, column + out) for column, (out, rank) in zip(self.columns, self.given, strict=True)]
        offset = 0
        for span in _spans(self.columns, [out for out, _ in self.given]):
            width = sum(ranks[part] for part in span.parts)
            size = (span.end - span.first) * width * TILE
            block = tiles[offset : offset + size].view(-1, width, TILE).transpose(0, 1).reshape(width, -1)
            offset, rank = offset + size, 0
            for part in span.parts:
                here = found[part][:, span.first * TILE : span.end * TILE]
                here.copy_(block[rank : rank + ranks[part], : here.shape[1]])
                rank += ranks[part]
        b = tuple(whole[:, column:].t() for whole, column in zip(found, self.columns, strict=True))
        return LoraFactors(self.a.float(), b, self.columns, self.scales)


def _by_column(factors: LoraFactors) -> LoraFactors:
    """The same with the parts in the order of their columns."""
    order = sorted(range(len(factors.b)), key=lambda part: factors.columns[part])
    if order == [*range(len(order))]:
        return replace(factors, a=factors.a.contiguous(), scales=factors.scales.contiguous())
    ranks = [b.shape[1] for b in factors.b]
    a, scales = torch.split(factors.a, ranks), torch.split(factors.scales, ranks)
    return LoraFactors(
        torch.cat([a[part] for part in order]),
        tuple(factors.b[part] for part in order),
        tuple(factors.columns[part] for part in order),
        torch.cat([scales[part] for part in order]),
        reach=None
        if factors.reach is None
        else torch.cat([torch.split(factors.reach, ranks, 1)[part] for part in order], 1),
    )


def _reach_of(factors: LoraFactors) -> Tensor:
    """`LoraFactors.reach` of factors that are whole."""
    return torch.stack([factors.a.abs().amax(1), torch.cat([b.abs().amax(0) for b in factors.b])])


def _held(values: Tensor, dtype: torch.dtype, reach: Tensor) -> tuple[Tensor, Tensor | None]:
    """values [R, n], none larger than reach [R], in another type, and for integers the scales [R] that they are to be
    multiplied with."""
    if dtype is not torch.int8:
        return values.to(dtype).contiguous(), None
    scales = reach.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST_INT8
    return (values / scales.unsqueeze(1)).round().to(torch.int8), scales


def _spans(columns: Sequence[int], outs: Sequence[int]) -> list[_Span]:
    """Runs of tiles to which the same parts add; `columns` ascending. Tiles without a part are in none."""
    reach = [(column // TILE, -(-(column + out) // TILE)) for column, out in zip(columns, outs, strict=True)]
    edges = sorted({edge for both in reach for edge in both})
    found = []
    for first, end in pairwise(edges):
        parts = [part for part, (low, high) in enumerate(reach) if low <= first and end <= high]
        if parts:
            found.append(_Span(first, end, range(parts[0], parts[-1] + 1)))
    return found


def _tiles(span: _Span, parts: Sequence[Tensor], columns: Sequence[int]) -> Tensor:
    """The span's tiles of B, [tiles * ranks * TILE], of `parts` [rank, out]; zero where a part has no outputs."""
    start, width = span.first * TILE, (span.end - span.first) * TILE
    rows = []
    for part in span.parts:
        b, at = parts[part], columns[part] - start
        row = b.new_zeros(len(b), width)
        low, high = max(at, 0), min(at + b.shape[1], width)
        row[:, low:high] = b[:, low - at : high - at]
        rows.append(row)
    return torch.cat(rows).view(-1, width // TILE, TILE).transpose(0, 1).reshape(-1)


def _view(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    spans: Sequence[_Span],
    columns: Sequence[int],
    shapes: Sequence[tuple[int, int]],
) -> Any:
    """Pointer to the `LoraView` of a layout."""
    starts = [*accumulate((rank for _, rank in shapes), initial=0)]
    table = (_LoraSpan * len(spans))()
    offset = 0
    for entry, span in zip(table, spans, strict=True):
        ranks = starts[span.parts.stop] - starts[span.parts.start]
        entry.first_tile, entry.end_tile, entry.offset = span.first, span.end, offset
        entry.first_rank, entry.ranks = starts[span.parts.start], ranks
        offset += (span.end - span.first) * ranks * TILE
    view = _LoraView(
        a=a.data_ptr(),
        b=b.data_ptr(),
        scales=scales.data_ptr(),
        rank=len(a),
        out_features=max(column + out for column, (out, _) in zip(columns, shapes, strict=True)),
        spans=table,
        num_spans=len(spans),
        type=_DECLARED.enums["CacheType"][_TYPES[a.dtype]],
    )
    return ctypes.pointer(view)


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
    """`LoraBatch`, for a batch of `tokens` tokens and segments that are `laid_out`."""
    table: Any = (_LoraTokens * len(segments))()
    for index, (own, factors) in enumerate(segments):
        assert isinstance(factors, LoraLayout)
        # A tuple, in the order of the fields, is faster than setting them one by one.
        table[index] = (None, tokens, factors.view) if own is None else (own.data_ptr(), own.shape[0], factors.view)
    return _LoraBatch(segments=table, num_segments=len(segments))
