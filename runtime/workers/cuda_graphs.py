"""Decoding from CUDA graphs: a step of one token a row is recorded once for a padded number of rows, then replayed.

A small model's step is hundreds of launches, and launching takes longer than computing. A graph repeats launches with
the same addresses and numbers; so all that differs between steps lies in tensors that stay in their places: the step's
own numbers (`StepInputs`), the block table and last token of each slot, adapters (`AdapterTable`), and the rules of
sampling (`RecordedSampling`). Not run on a GPU yet; tests replay what is recorded on the CPU, launch by launch.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import decode_rows
from kernels.nf4 import Nf4Weight
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.support.logs import get_logger
from runtime.workers.adapter_table import AdapterTable
from runtime.workers.recorded_sampling import GraphTail, RecordedSampling
from runtime.workers.step_inputs import StagedStep, StepInputs
from runtime.workers.transfers import Transfers

log = get_logger(__name__)

STEP = 8
"""Rows are padded to a multiple of this number from here on, and to a power of two below."""
MOST = 256
"""Most rows of a graph: beyond, computing takes longer than launching."""
FIRST_CONTEXT = 1024
"""Tokens of the longest sequence for which the first graph of a size is recorded; others are for four times as many
each: attention's launches and its memory are for the longest."""
MAX_GRAPHS = 160
"""Most graphs that are kept: a further one takes the place of the one that was not used for the longest time."""

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


@dataclass(frozen=True)
class GraphVariant:
    """Work of one graph."""

    choice: GraphTail
    adapters: bool
    size: int
    """Rows, padding included."""
    context: int
    """Tokens of the longest sequence."""

    def __str__(self) -> str:
        adapters = ", adapters" if self.adapters else ""
        return f"{self.choice}{adapters}, {self.size} rows, {self.context} tokens"


class DecodeGraphs:
    """The graphs of one decoder over one cache, each recorded when it is first needed, and what they read by slot."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sampling: RecordedSampling,
        adapters: AdapterTable | None,
        *,
        max_running: int,
        max_len: int,
        copies: Transfers,
        record: Recorder | None = None,
    ) -> None:
        """`max_len`: tokens of the longest sequence. `record`: default is a CUDA graph. The cache has a spare block."""
        self._decoder = decoder
        self._cache = cache
        self._sampling = sampling
        self._adapters = adapters
        self._max_len = max_len
        self._copies = copies
        self._record = record or CudaRecorder()
        self._graphs: OrderedDict[GraphVariant, Work] = OrderedDict()
        self._generations = (0, 0)
        self._inputs: dict[int, StepInputs] = {}
        self._width = -(-max_len // cache.block_size)
        self.padding_slot = max_running
        """Slot of rows that are no sequence's."""
        device = decoder.device
        self._tokens = torch.zeros(max_running + 1, dtype=torch.int64, device=device)
        """Last token that was sampled in each slot."""
        self._blocks = torch.zeros(max_running + 1, self._width + 1, dtype=torch.int64, device=device)
        """Block table of each slot. The last column is of no sequence."""

    @property
    def recorded(self) -> list[str]:
        """Names of the graphs."""
        return [str(variant) for variant in self._graphs]

    def stage(self, rows: int) -> StagedStep:
        """Numbers of a step for that many rows: all are padding, which writes to no place of a sequence."""
        staged = StagedStep(padded(rows))
        staged.integers("slot")[:] = self.padding_slot
        staged.integers("table_index")[:] = self._width
        staged.integers("place")[:] = self._cache.spare_block * self._cache.block_size
        for name in ("temperature", "top_p", "repetition"):
            staged.reals(name)[:] = 1.0
        staged.integers("top_k")[:] = self._decoder.spec.vocab_size
        return staged

    def put_table(self, slot: int, blocks: np.ndarray) -> None:
        """Set the blocks of a slot, all at once. Single ones that are added later come with the step."""
        self._copies.put(blocks, self._blocks[slot, : len(blocks)])

    def run(self, choice: GraphTail, staged: StagedStep, *, adapters: bool, longest: int) -> Tensor:
        """Launch a step whose longest sequence has that many tokens: hidden states [size, hidden], or what
        `RecordedSampling.choose` returns. The result is overwritten by the next step."""
        self._forget_outdated()
        size = staged.values.shape[1]
        variant = GraphVariant(choice, adapters, size, self._context(longest))
        inputs = self._inputs.get(size)
        if inputs is None:
            inputs = self._inputs[size] = StepInputs(size, self._decoder.device)
        if variant not in self._graphs:
            self._add(variant, inputs)
        self._graphs.move_to_end(variant)
        self._copies.put(staged.values, inputs.values)
        return self._graphs[variant]()

    def _context(self, longest: int) -> int:
        context = FIRST_CONTEXT
        while context < longest:
            context *= 4
        return min(context, self._max_len)

    def _add(self, variant: GraphVariant, inputs: StepInputs) -> None:
        """Record a graph. To record it runs the step, so all its rows are padding then."""
        if len(self._graphs) == MAX_GRAPHS:
            self._drop(next(iter(self._graphs)))
        self._copies.put(self.stage(variant.size).values, inputs.values)

        def work() -> Tensor:
            return self._step(variant, inputs)

        try:
            self._graphs[variant] = self._record(work)
            log.info("step_recorded", variant=str(variant), graphs=len(self._graphs))
        except RuntimeError:  # CUDA's own: for want of memory, say
            log.exception("recording_failed", variant=str(variant))
            self._graphs[variant] = work

    def _forget_outdated(self) -> None:
        """Drop graphs that read tensors which are elsewhere now."""
        adapters = 0 if self._adapters is None else self._adapters.generation
        generations = adapters, self._sampling.generation
        if generations == self._generations:
            return
        for variant in list(self._graphs):
            moved = variant.adapters and adapters != self._generations[0]
            ruled = variant.choice is GraphTail.RULED and generations[1] != self._generations[1]
            if moved or ruled:
                self._drop(variant)
        self._generations = generations

    def _drop(self, variant: GraphVariant) -> None:
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)  # it may be under way
        del self._graphs[variant]

    def _step(self, variant: GraphVariant, inputs: StepInputs) -> Tensor:
        """The recorded work. Nothing here may be the host's choice, or depend on a value of a tensor."""
        decoder, cache, size = self._decoder, self._cache, variant.size
        slot, position = inputs.integers("slot"), inputs.integers("position")
        self._blocks.index_put_((slot, inputs.integers("table_index")), inputs.integers("block"))
        given = inputs.integers("token_id")
        token_ids = torch.where(given < 0, self._tokens.index_select(0, slot), given)
        width = -(-variant.context // cache.block_size)
        rows = decode_rows(
            inputs.integers("place"),
            self._blocks[:, :width].index_select(0, slot),
            torch.stack((torch.arange(size, device=slot.device), torch.ones_like(slot), position), dim=1),
            block_size=cache.block_size,
            longest=variant.context,
        )
        attention = PagedAttention(decoder.ops, cache, rows, decoder.spec)
        adaptation = None
        if variant.adapters:
            assert self._adapters is not None
            adaptation = self._adapters.adaptation(inputs.integers("adapter"))
        hidden = decoder.forward(token_ids, position, attention, adaptation)
        if variant.choice is GraphTail.HIDDEN:
            return hidden
        chosen = self._sampling.choose(variant.choice, decoder.local_logits(hidden), inputs)
        self._tokens.index_copy_(0, slot, chosen[0])
        return chosen


class CudaRecorder:
    """Records CUDA graphs, which share their memory: one runs at a time, and its result is read before the next."""

    def __init__(self) -> None:
        self._first: torch.cuda.CUDAGraph | None = None
        """The graph whose memory all share."""

    def __call__(self, work: Work) -> Work:
        """Run the work once on another stream, which compiles the kernels; then record it into a graph."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare adapters meanwhile: what they do is no part of it, and no error.
        pool = None if self._first is None else self._first.pool()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            found = work()
        self._first = self._first or graph

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay
