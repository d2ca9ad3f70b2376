"""Decoding from CUDA graphs: a step of one token a row is recorded once for a padded number of rows, then replayed.

A small model's step is hundreds of launches, and launching takes longer than computing. A graph reads its inputs where
they lay when it was recorded, so every step is copied there. Not run on a GPU yet; the tests run all of it but the
recording itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import PagedRows
from kernels.nf4 import Nf4Weight
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.workers.batch import FlatBatch

STEP = 8
"""Rows are padded to a multiple of this number from here on, and to a power of two below."""
MOST = 256
"""Most rows of a graph: beyond, computing takes longer than launching."""

Work = Callable[[], Tensor]
Recorder = Callable[[Work], Work]
"""Converts work over tensors at fixed addresses into a call that repeats it."""


def padded(rows: int) -> int:
    """Number of rows of the graph for a batch of `rows` rows."""
    if rows <= STEP:
        return 1 << (rows - 1).bit_length()
    return -(-rows // STEP) * STEP


def unsuited(decoder: Decoder) -> str | None:
    """Reason why this decoder's steps cannot be recorded; None if they can."""
    if decoder.device.type != "cuda" or decoder.ops.name != "triton":
        return "only the Triton kernels on CUDA find all that changes from step to step in tensors"
    if decoder.group.size > 1:
        return "what ranks add up is not recorded"
    if decoder.spec.experts is not None:
        return "which experts are computed is decided on the host"
    if any(isinstance(parameter.quantised, Nf4Weight) for parameter in decoder.parameters().values()):
        return "nf4 copies its code to the device in every step"
    return None


@dataclass(frozen=True, eq=False)
class _Graph:
    token_ids: Tensor
    positions: Tensor
    rows: PagedRows
    replay: Work


class DecodeGraphs:
    """The graphs of one decoder over one cache, each recorded when it is first needed."""

    def __init__(self, decoder: Decoder, cache: KVCache, *, max_len: int, record: Recorder | None = None) -> None:
        """`max_len`: tokens of the longest sequence. `record`: default is a CUDA graph."""
        self._decoder = decoder
        self._cache = cache
        self._max_len = max_len
        self._record = record or _record
        self._graphs: dict[int, _Graph] = {}

    def takes(self, batch: FlatBatch) -> bool:
        """True if all rows are of one token, for the base, and few enough."""
        return not batch.adapters and len(batch.paged.counts) == len(batch.token_ids) <= MOST

    def forward(self, batch: FlatBatch) -> Tensor:
        """`Decoder.forward` for a batch that it takes. The result is overwritten by the next call."""
        count = len(batch.token_ids)
        size = padded(count)
        # Padding repeats the last row: it writes the same keys and values to the same place.
        index = torch.arange(size, device=batch.token_ids.device).clamp_(max=count - 1)
        graph = self._graphs.get(size)
        if graph is None:
            self._graphs[size] = graph = self._new(batch, index)
        else:
            self._fill(graph.token_ids, graph.positions, graph.rows, batch, index)
        return graph.replay()[:count]

    def _new(self, batch: FlatBatch, index: Tensor) -> _Graph:
        """Record a graph. Recording runs the step, so the graph's inputs are this batch's from the beginning."""
        size, device, block = len(index), index.device, self._cache.block_size
        rows = PagedRows(
            slots=torch.empty(size, dtype=torch.int64, device=device),
            counts=[1] * size,
            contexts=[self._max_len - 1] * size,  # for the number of programs; what they read is `extents`
            tables=torch.zeros(size, -(-self._max_len // block), dtype=torch.int64, device=device),
            block_size=block,
        )
        token_ids, positions = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
        self._fill(token_ids, positions, rows, batch, index)
        attention = PagedAttention(self._decoder.ops, self._cache, rows, self._decoder.spec)
        replay = self._record(lambda: self._decoder.forward(token_ids, positions, attention))
        return _Graph(token_ids, positions, rows, replay)

    @staticmethod
    def _fill(token_ids: Tensor, positions: Tensor, rows: PagedRows, batch: FlatBatch, index: Tensor) -> None:
        token_ids.copy_(batch.token_ids[index])
        positions.copy_(batch.positions[index])
        rows.slots.copy_(batch.paged.slots[index])
        rows.tables[:, : batch.paged.tables.shape[1]] = batch.paged.tables[index]
        rows.tiles.extents[:, 2] = positions


def _record(work: Work) -> Work:
    """Run the work once on another stream, which compiles the kernels; then record it into a graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay
