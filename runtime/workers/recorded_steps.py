"""Steps of one token a row that run as recorded, and whose tokens are read after the next step was launched.

The host knows all of such a step but the tokens that the one before it sampled, and these stay on the device. So a step
can be launched before the last one's tokens were read: they come back by one copy, for which nothing waits but its
reader.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from runtime.messages import Admission, Row, StepResult
from runtime.workers.adapter_table import AdapterTable
from runtime.workers.batch import TokenOutOfRange
from runtime.workers.cuda_graphs import MOST, DecodeGraphs
from runtime.workers.grammar_masks import GrammarMasks, Masks
from runtime.workers.recorded_sampling import GraphTail, RecordedSampling
from runtime.workers.transfers import Transfers


@dataclass(eq=False)
class LaunchedStep:
    """A step that was launched and whose tokens were not read."""

    step: int
    rows: Sequence[Row]
    choice: GraphTail
    wait: Callable[[], np.ndarray]
    """Waits for what `RecordedSampling.choose` found, [2, size]."""
    failed: Mapping[int, str]
    """Slots that a grammar ends."""
    book: Callable[["LaunchedStep"], StepResult]
    result: StepResult | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    def finish(self) -> StepResult:
        """Wait for the tokens, and book them. To be called in the order of launching; a second time gives the same
        result, or raises the same error."""
        if self.error is not None:
            raise self.error
        if self.result is None:
            try:
                self.result = self.book(self)
            except Exception as error:
                self.error = error
                raise
        return self.result

    def then(self, change: Callable[[StepResult], StepResult]) -> "LaunchedStep":
        """The same, with its result changed once it is there."""
        book = self.book
        self.book = lambda launched: change(book(launched))
        return self


@dataclass(frozen=True, eq=False)
class Sequences:
    """A worker's sequences by slot, which it changes in place."""

    tokens: Mapping[int, list[int]]
    tables: np.ndarray
    """[slots, max_blocks] int64 block ids."""
    num_blocks: Sequence[int]
    adapters: Mapping[int, str]
    """The adapter of each slot that is not for the base."""
    pooled: Container[int]
    vocab_size: int


class RecordedSteps:
    """Chooses the graph for a batch, and fills in what it reads."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        sampling: RecordedSampling,
        adapters: AdapterTable | None,
        grammars: GrammarMasks | None,
        sequences: Sequences,
        *,
        block_size: int,
        copies: Transfers,
    ) -> None:
        self.graphs = graphs
        self.refused: Counter[str] = Counter()
        """Steps that were not recorded, by the reason."""
        self._sampling = sampling
        self._adapters = adapters
        self._grammars = grammars
        self._sequences = sequences
        self._block_size = block_size
        self._copies = copies
        self._num_put: dict[int, int] = {}
        """Blocks of each slot that are in its table on the device."""

    def admit(self, admission: Admission) -> None:
        """Take in a sequence that enters a slot, after the sampler has."""
        self._num_put[admission.slot] = 0
        self._sampling.admit(admission)

    def refusal(self, rows: Sequence[Row]) -> str | None:
        """Reason why a batch's layers do not run as recorded; None if they do."""
        if len(rows) > MOST:
            return f"more than {MOST} rows"
        for row in rows:
            if row.count != 1 or not row.sample or row.draft:
                return "a row has several tokens, or samples none"
            if row.slot in self._sequences.pooled:
                return "hidden states are pooled"
            key = self._sequences.adapters.get(row.slot, "")
            if key and (self._adapters is None or self._adapters.number(key) is None):
                return "an adapter changes more than linears"
        return None

    def sampling_refusal(self, rows: Sequence[Row]) -> str | None:
        """Reason why a batch's tokens are not chosen as recorded; None if they are."""
        return self._sampling.refusal([row.slot for row in rows])

    def follows(self, rows: Sequence[Row]) -> bool:
        """True if a batch that is not refused can be launched before the tokens of the last one are known."""
        waits = self._sampling.needs_tokens([row.slot for row in rows])
        return not waits and not any(row.new_token_ids or row.forces for row in rows)

    def launch(self, step: int, rows: Sequence[Row], book: Callable[[LaunchedStep], StepResult]) -> LaunchedStep:
        """Launch a batch that is not refused. Raises `TokenOutOfRange`."""
        slots = [row.slot for row in rows]
        tokens = self._sequences.tokens
        masks = None
        if self._grammars is not None:
            masking = self._grammars.begin(rows, tokens, slots)
            masks = None if masking is None else masking.result()
        lengths = [row.start + 1 for row in rows]
        choice = self._sampling.choice(slots, lengths)
        found = self._run(choice, rows, masks)
        return LaunchedStep(step, rows, choice, self._copies.get(found), {} if masks is None else masks.failed, book)

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [len(rows), hidden] after the layers of a batch whose sampling alone is refused."""
        return self._run(GraphTail.HIDDEN, rows, None)[: len(rows)]

    def book_tokens(self, launched: LaunchedStep, tokens: Sequence[int]) -> None:
        """Keep the counts of tokens in step with what the device has counted."""
        if launched.choice is GraphTail.RULED:
            self._sampling.note([row.slot for row in launched.rows], tokens)

    def _run(self, choice: GraphTail, rows: Sequence[Row], masks: Masks | None) -> Tensor:
        sequences, count, size = self._sequences, len(rows), self._block_size
        staged = self.graphs.stage(count)
        slots, starts = np.array([(row.slot, row.start) for row in rows]).T
        known = [tokens[row.start] if row.start < len(tokens := sequences.tokens[row.slot]) else -1 for row in rows]
        if (largest := max(known)) >= sequences.vocab_size:
            raise TokenOutOfRange(f"token id {largest} in a batch, and the embedding has {sequences.vocab_size} rows")
        staged.integers("token_id")[:count] = known
        staged.integers("position")[:count] = starts
        staged.integers("slot")[:count] = slots
        staged.integers("place")[:count] = sequences.tables[slots, starts // size] * size + starts % size
        self._stage_blocks(staged.integers("table_index"), staged.integers("block"), rows)
        numbers = [self._number(row.slot) for row in rows]
        staged.integers("adapter")[:count] = numbers
        lengths = (starts + 1).tolist()
        try:
            self._sampling.fill(
                staged, choice, slots.tolist(), lengths, [sequences.tokens[row.slot] for row in rows], masks
            )
            return self.graphs.run(choice, staged, adapters=any(numbers), longest=max(lengths))
        except Exception:  # what came with the step may not have arrived
            self._num_put.update((row.slot, 0) for row in rows)
            raise

    def _number(self, slot: int) -> int:
        key = self._sequences.adapters.get(slot)
        if key is None:
            return 0
        assert self._adapters is not None, "refused"
        number = self._adapters.number(key)
        assert number is not None, "refused"
        return number

    def _stage_blocks(self, index: np.ndarray, block: np.ndarray, rows: Sequence[Row]) -> None:
        """A block that a row has got since its last step comes with this one; a table with more is copied whole."""
        sequences = self._sequences
        for place, row in enumerate(rows):
            held, put = sequences.num_blocks[row.slot], self._num_put.get(row.slot, 0)
            if held == put + 1 and put:
                index[place], block[place] = put, sequences.tables[row.slot, put]
            elif held != put:
                self.graphs.put_table(row.slot, sequences.tables[row.slot, :held])
            self._num_put[row.slot] = held
