"""A step's plan while it is being made: rows can still be withdrawn when their request is preempted."""

from collections.abc import Iterable
from typing import NamedTuple

from runtime.blocks import BlockTable
from runtime.messages import Admission, Move, Row, StepPlan
from runtime.scheduler.request import Request


class Stay(NamedTuple):
    """Whom a row is for: a request, as long as it holds this table."""

    request: Request
    table: BlockTable

    @property
    def over(self) -> bool:
        """It has ended or lost its place since: what is computed for it is dropped."""
        return self.request.table is not self.table


class Planning:
    """Rows within a budget of tokens, and what workers must know before they compute them."""

    def __init__(self, step: int, budget: int) -> None:
        self.step = step
        self.budget = budget
        """Tokens that may still be added."""
        self._rows: dict[int, Row] = {}
        self._stays: dict[int, Stay] = {}
        self._admitted: dict[int, Admission] = {}
        self._moves: list[Move] = []

    def move(self, moves: Iterable[Move]) -> None:
        """Copy blocks, after all copies that were planned before. Never taken back: a copy that has become useless
        does no harm, as whoever gets its target writes to it later."""
        self._moves += moves

    def admit(self, request: Request) -> None:
        """Tell the workers all about a request that has just got its slot and its table."""
        assert request.slot is not None
        assert request.table is not None
        request.num_sent_blocks = len(request.table.blocks)
        request.num_told = len(request.tokens)
        self._admitted[request.slot] = Admission(
            slot=request.slot,
            token_ids=list(request.tokens),
            prompt_len=request.prompt_len,
            block_ids=list(request.table.blocks),
            params=request.params,
            seed=request.seed,
            suppressed_ids=request.suppressed_ids,
            adapter=request.submission.adapter,
            scored=request.submission.scored,
            candidates=request.candidates,
        )

    def add(self, request: Request, count: int, draft: list[int]) -> None:
        """Compute `count` of the tokens that the request wants, and then those of `draft`. It is booked as if it
        were done; what came of it is settled when the step is committed."""
        slot, table, start = request.slot, request.table, request.num_computed
        assert slot is not None
        assert table is not None
        new_blocks: list[int] = []
        if request.num_sent_blocks < (known := len(table.blocks)):
            new_blocks, request.num_sent_blocks = table.blocks[request.num_sent_blocks :], known
        total = count + len(draft)
        sample = start + count == len(request.tokens) + request.num_pending
        told: list[int] = []
        if request.submission.beams is not None:
            told, request.num_told = request.tokens[request.num_told :], len(request.tokens)
        else:
            request.num_pending += sample
        self._rows[slot] = Row(
            slot=slot, start=start, count=total, sample=sample, new_blocks=new_blocks, draft=draft, told=told
        )
        self._stays[slot] = Stay(request, table)
        request.num_computed = start + total
        self.budget -= total

    def withdraw(self, request: Request) -> None:
        """The request is about to lose its slot. What was planned for it is not to happen."""
        slot = request.slot
        assert slot is not None
        row = self._rows.pop(slot, None)
        self._stays.pop(slot, None)
        if row is not None:
            self.budget += row.count
        self._admitted.pop(slot, None)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def stays(self) -> dict[int, Stay]:
        """By the slots of the rows."""
        return self._stays

    def done(self) -> StepPlan:
        return StepPlan(
            step=self.step,
            admitted=list(self._admitted.values()),
            rows=list(self._rows.values()),
            moves=self._moves,
        )
