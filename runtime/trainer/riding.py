"""Tokens of training that ride in the steps of requests: the forward pass of a sequence, row by row beside those that
decode.

A step of few rows takes as long as reading the weights does, so some further rows cost next to nothing. A ride is the
forward pass of one piece of a micro-batch as such rows, with the adapter in training; the layers keep what its backward
pass needs, which so computes nothing but gradients. A run waits for a ride where no piece is ready to go backward: rows
of a step do more of a forward pass than slices would in the same time. While one piece goes backward in slices, the
next one rides. Nothing depends on it: what is dropped on the way is computed in slices.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kernels import KeptLayers, LoraFactors, Ops, RidingTokens, StackFactors
from runtime.messages import RidingRow
from runtime.support.failpoints import failpoint
from runtime.trainer.data.example import Example
from runtime.trainer.lora import AdaptedLinear, TrainableLora
from runtime.trainer.slices import DOUBTED_COST_FACTOR, Slice, Sliced, Slices

# A piece has at least this many tokens where its micro-batch has them: fewer at once go backward at a lower speed.
LEAST_PIECE_TOKENS = 64
# What all rides of a run keep at the most, in parts of the weights' size.
MEMORY_PART = 3
# …but they may keep this much.
LEAST_MEMORY_BYTES = 32 << 20
# Steps in a row without its tokens after which a ride that is waited for is given up: more than there are between two
# steps with riding tokens (`REST_STEPS`) where they pay.
MOST_REFUSALS = 8
# Steps in a row that fail with them after which any is.
MOST_FAILURES = 3
# A piece whose rides were dropped this often goes in slices.
MOST_DROPS = 2

_ids = itertools.count(1)


class Ride:
    """The forward pass of one piece, T tokens. Engine thread only."""

    def __init__(
        self,
        inputs: Tensor,
        sequences: Sequence[slice],
        memory: "KeptMemory",
        factors: StackFactors,
        *,
        dropout: float,
        seeds: Mapping[tuple[int, str], int],
        first_row: int,
    ) -> None:
        """inputs [T, hidden] of the first layer; `sequences`: places of the piece's sequences among the tokens. The
        others are those of `RidingTokens`. Needs `memory.has_room`."""
        self.kept, self.final = memory.take(len(inputs))
        """`final` [T, hidden]: after the last layer."""
        self._memory = memory
        self._inputs = inputs
        self._sequences = sequences
        self._factors = factors
        self._dropout, self._seeds, self._first_row = dropout, seeds, first_row
        self._ids = [next(_ids) for _ in sequences]
        self._at = 0
        """Index of the sequence that rides."""
        self._done = 0
        """Tokens of it that are computed."""
        self._failures = self._refusals = 0
        self.dropped = False
        self.on_drop: Callable[[int], None] = lambda ride: None
        """Called with the id of the sequence that rides when the ride is dropped."""

    @property
    def complete(self) -> bool:
        return self._at == len(self._sequences)

    @property
    def under_way(self) -> bool:
        """True if there are tokens to compute still."""
        return not self.dropped and not self.complete

    @property
    def num_done(self) -> int:
        """Tokens that are computed."""
        return len(self._inputs) if self.complete else self._sequences[self._at].start + self._done

    @property
    def fraction(self) -> float:
        """Part of the tokens that are computed."""
        return self.num_done / len(self._inputs)

    def row(self, most: int) -> RidingRow:
        """The next tokens of a ride that is under way: about `most` of them, which is at least 2."""
        place = self._sequences[self._at]
        length = place.stop - place.start
        left = length - self._done
        count = left if left - most < 2 else most  # a single token would be among those that decode
        return RidingRow(ride=self._ids[self._at], length=length, start=self._done, count=count)

    def tokens(self, row: RidingRow) -> RidingTokens:
        """The tokens of a row, to be computed."""
        failpoint("riding.tokens")
        start = self._sequences[self._at].start + row.start
        return RidingTokens(
            inputs=self._inputs[start : start + row.count],
            start=start,
            kept=self.kept,
            adapter=self._factors,
            dropout=self._dropout,
            seeds=self._seeds,
            first_row=self._first_row + start,
        )

    def take(self, row: RidingRow, hidden: Tensor) -> None:
        """Keep hidden states [count, hidden] of a row after the last layer."""
        start = self._sequences[self._at].start + row.start
        self.final[start : start + row.count] = hidden

    def settle(self, row: RidingRow, *, planned: bool, ridden: bool) -> None:
        """Note what became of a row: it was computed, had no room in its step, or failed there."""
        if ridden:
            self._failures = self._refusals = 0
            self._done += row.count
            if self._done == row.length:
                self._at, self._done = self._at + 1, 0
            return
        self._failures += planned
        self.refuse()
        if self._failures >= MOST_FAILURES:
            self.drop()

    def refuse(self) -> None:
        """Note a step in which nothing could ride."""
        self._refusals += 1
        if self._refusals >= MOST_REFUSALS:
            self.drop()

    def drop(self) -> None:
        """Give up, in any state, and give back what it holds. Doing it twice is fine."""
        if self.dropped:
            return
        self.dropped = True
        if not self.complete:
            self.on_drop(self._ids[self._at])
        self._memory.give(self.kept, self.final)


class KeptMemory:
    """Memory of what rides keep. That of one that has ended is used again: fresh pages would have to be cleared."""

    def __init__(self, layers: int, widths: tuple[int, int, int, int], dtype: torch.dtype, most_bytes: int) -> None:
        """`widths`: see `KeptLayers`."""
        self._layers = layers
        self._widths = widths
        self._dtype = dtype
        self._most = most_bytes // dtype.itemsize
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []

    def _numbers(self, tokens: int) -> int:
        return tokens * (self._layers * sum(self._widths) + self._widths[0])

    def has_room(self, tokens: int) -> bool:
        """True if a piece of this size may ride now."""
        return self._numbers(tokens) + sum(map(len, self._used)) <= self._most

    def take(self, tokens: int) -> tuple[KeptLayers, Tensor]:
        """Memory for a piece: of its layers, and [tokens, hidden] behind them. Needs `has_room`."""
        needed = self._numbers(tokens)
        fitting = [flat for flat in self._free if len(flat) >= needed]
        flat = min(fitting, key=len, default=None)
        if flat is None:
            self._free.clear()
            flat = torch.empty(needed, dtype=self._dtype)
        else:
            self._free = [one for one in self._free if one is not flat]
        self._used.append(flat)
        width = tokens * sum(self._widths)
        layers = flat[: self._layers * width].view(self._layers, width)
        final = flat[self._layers * width : needed].view(tokens, self._widths[0])
        return KeptLayers(layers, tokens, self._widths), final

    def give(self, kept: KeptLayers, final: Tensor) -> None:
        """Take back what `take` gave."""
        address = kept.memory.data_ptr()
        for flat in self._used:
            if flat.data_ptr() == address:
                self._free.append(flat)
        self._used = [flat for flat in self._used if flat.data_ptr() != address]


# -- pieces ----------------------------------------------------------------------------------------


class Rider(Protocol):
    """The work on one piece."""

    ride: Ride | None
    """The forward pass of it that is under way, or complete; None: it goes in slices."""

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride:
        """Set `ride`. Needs `KeptMemory.has_room`."""


R = TypeVar("R", bound=Rider)


@dataclass(eq=False)
class MicroPiece(Generic[R]):
    """Some sequences of one micro-batch, which are computed together."""

    examples: Sequence[Example]
    work: R
    drops: int = 0
    """Rides of it that were dropped."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.examples))


def cut(examples: Sequence[Example], group_size: int) -> Iterator[tuple[int, Sequence[Example]]]:
    """The examples of a micro-batch in pieces of `LEAST_PIECE_TOKENS` or more, none between groups of sequences that
    belong together; each with the number of tokens before it."""
    first = start = tokens = 0
    for end in range(group_size, len(examples) + 1, group_size):
        tokens += sum(map(len, examples[end - group_size : end]))
        if tokens >= LEAST_PIECE_TOKENS or end == len(examples):
            yield start, examples[first:end]
            first, start, tokens = end, start + tokens, 0


class Rides(Generic[R]):
    """The rides of one run: one after the other, of the pieces of a step of the optimiser, in which weights do not
    change. Engine thread only."""

    def __init__(self, lora: TrainableLora, ops: Ops, memory: KeptMemory) -> None:
        """`ops` serve requests."""
        self._lora = lora
        self._ops = ops
        self._memory = memory
        self._pieces: list[MicroPiece[R]] = []
        self._factors: StackFactors | None = None
        self._current: Ride | None = None
        self._awaited: Ride | None = None
        """The ride that the run waits for."""
        self._patient = True
        """False: this step of the optimiser waits for no further ride."""

    def open(self, pieces: list[MicroPiece[R]]) -> Slices:
        """Let pieces ride as long as they are in this list, with the weights as they are now."""
        places: dict[tuple[int, str], LoraFactors] = {}
        for layer, linears in itertools.groupby(self._lora.linears.items(), key=lambda item: item[0][0]):
            yield Slice("ride_factors", 1)
            places |= {(layer, name): self._ops.prepare_lora(factors_of(one)) for (_, name), one in linears}
        self._factors = StackFactors(places)
        self._pieces, self._patient = pieces, True

    def close(self) -> None:
        """End all rides of pieces that are left."""
        for piece in self._pieces:
            if piece.work.ride is not None:
                piece.work.ride.drop()
        self._pieces, self._factors, self._current, self._awaited = [], None, None, None

    def next(self) -> Ride | None:
        """The ride that is under way, or that of a further piece; None where there is none, or no memory for it."""
        if self._current is not None and self._current.under_way:
            return self._current
        self._current = None
        self._sweep()
        for piece in self._pieces:
            if piece.work.ride is None and self._may_ride(piece):
                assert self._factors is not None
                self._current = piece.work.begin_ride(self._factors, self._memory)
                break
        return self._current

    def stop(self) -> None:
        """Drop the ride that is under way, and wait for none in this step of the optimiser."""
        self._patient = False
        if self._current is not None and self._current.under_way:
            self._current.drop()

    @property
    def awaited(self) -> Ride | None:
        """The ride under way that the run can do nothing before the end of; None: it does not wait."""
        return self._awaited if self._awaited is not None and self._awaited.under_way else None

    def choose(self, pieces: Sequence[MicroPiece[R]]) -> Sliced[MicroPiece[R]]:
        """The next of these pieces to work on: one that has ridden. It is waited for; where a ride that was waited for
        is dropped, pieces that do not ride come first from then on."""
        while True:
            self._sweep()
            ridden = (piece for piece in pieces if piece.work.ride is not None and piece.work.ride.complete)
            if (found := next(ridden, None)) is not None:
                return found
            fresh = next((piece for piece in pieces if piece.work.ride is None), None)
            ride = self.next() if self._patient or fresh is None else None
            if ride is None:
                assert fresh is not None  # one that rides is under way, so it would have been the next
                return fresh
            self._awaited = ride
            yield Slice("ride", 1)
            self._awaited = None
            self._patient = self._patient and not ride.dropped

    def _may_ride(self, piece: MicroPiece[R]) -> bool:
        single = any(len(example) < 2 for example in piece.examples)
        return not single and piece.drops < MOST_DROPS and self._memory.has_room(piece.num_tokens)

    def _sweep(self) -> None:
        """Forget rides that were dropped."""
        for piece in self._pieces:
            if piece.work.ride is not None and piece.work.ride.dropped:
                piece.work.ride = None
                piece.drops += 1


def factors_of(linear: AdaptedLinear) -> LoraFactors:
    """An adapted linear's factors as they are now, to serve."""
    return LoraFactors(
        a=linear.a.detach(),
        b=tuple(b.detach() for b in linear.b),
        columns=tuple(place.start for place in linear.columns),
        scales=torch.cat([linear.a.new_full((b.shape[1],), s) for b, s in zip(linear.b, linear.scales, strict=True)]),
    )


# -- rows ------------------------------------------------------------------------------------------
#
# How many rows ride in a step: as many as are worth it. What they cost is learned from steps with and without them.

# Numbers of rows to choose from.
SIZES = (4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
# Nothing rides in one of this number of steps, so that the time of a step alone stays known.
REST_STEPS = 8
# One in this number of steps tries a neighbour of the best number…
TRY_STEPS = 16
# …or in this number, while that has been tried less often than `TRIALS` times.
FRESH_TRY_STEPS = 2
TRIALS = 4
# Weight of the newest value in costs.
COST_WEIGHT = 0.1


class RowPace:
    """The number of riding rows of each step. Times in seconds."""

    def __init__(self, most: int) -> None:
        self._sizes = [size for size in SIZES if size < most] + [most]
        self._costs = [0.0] * len(self._sizes)
        self._trials = [0] * len(self._sizes)
        self._steps = 0

    def choose(self, *, price: float, slack: float) -> int:
        """Rows of the next step, which may be 0. `price`: time of a token's forward pass in slices; `slack`: time that
        the targets leave beside a step."""
        self._steps += 1
        if self._steps % REST_STEPS == 0:
            return 0
        best = self._best(price, slack)
        other = best + (1 if self._steps // TRY_STEPS % 2 == 0 or best <= 0 else -1)
        if 0 <= other < len(self._sizes):
            every = TRY_STEPS if self._trials[other] >= TRIALS else FRESH_TRY_STEPS
            if self._steps % every == 1:
                if self._affordable(other, best, slack):
                    return self._sizes[other]
                # It may be wrong (something else ran), and would never be tried again.
                self._costs[other] *= DOUBTED_COST_FACTOR
        return 0 if best < 0 else self._sizes[best]

    def cost(self, rows: int) -> float:
        """Time by which this number of riding rows makes a step longer."""
        return max(0.0, self._costs[self._sizes.index(rows)]) if rows in self._sizes else 0.0

    def learn(self, rows: int, seconds: float) -> None:
        """Note by how much a step with this number of riding rows took longer than one without."""
        if rows in self._sizes:
            index = self._sizes.index(rows)
            self._trials[index] += 1
            weight = max(COST_WEIGHT, 1 / self._trials[index])
            self._costs[index] += weight * (seconds - self._costs[index])

    def _best(self, price: float, slack: float) -> int:
        """Index of the number that is worth most; -1: nothing is worth its cost."""
        known = [index for index, trials in enumerate(self._trials) if trials and self._costs[index] <= slack]
        if not any(self._trials):
            return 0
        worth = {index: price * self._sizes[index] - max(0.0, self._costs[index]) for index in known}
        best = max(worth, key=lambda index: worth[index], default=-1)
        return best if best >= 0 and worth[best] > 0 else -1

    def _affordable(self, index: int, best: int, slack: float) -> bool:
        """True if a number should fit into the slack by what is known of it, or of the `best`."""
        if self._trials[index] or best < 0:
            return self._costs[index] <= slack
        return max(0.0, self._costs[best]) * self._sizes[index] / self._sizes[best] <= slack
