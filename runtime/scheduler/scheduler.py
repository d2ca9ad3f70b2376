"""The token-step scheduler.

There is no prefill phase and no decode phase. Every request has tokens that are known and tokens
that are computed, and each step lets some requests catch up by some tokens, within a budget.
A step is `schedule` (a plan), then `commit` (what came of it). Knows neither tensors nor text.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runtime.blocks import BlockManager
from runtime.errors import Conflict, TooManyRequests
from runtime.messages import Admission, FinishReason, Row, StepPlan, StepResult
from runtime.scheduler.policies import Policy
from runtime.scheduler.request import Request, State


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step added to one request: a new token, or its end without one."""

    request: Request
    token: int | None
    error: str | None = None


class Scheduler:
    """Owns every request that is not finished, the slots, and (through the manager) the blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        policy: Policy,
        *,
        max_batched_tokens: int,
        max_running: int,
        max_waiting: int,
        max_prefill_chunk: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = blocks
        self.waiting = policy
        self.running: list[Request] = []
        """In order of admission."""
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._budget = max_batched_tokens
        self._chunk = min(max_prefill_chunk or max_batched_tokens, max_batched_tokens)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._by_slot: dict[int, Request] = {}
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._step = 0

    # -- requests ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `TooManyRequests` when the queue is full, `Conflict` for an id in use."""
        if len(self.waiting) >= self._max_waiting:
            raise TooManyRequests(f"The queue is full: {self._max_waiting} requests are waiting. Try again later.")
        if request.id in self._requests:
            raise Conflict(f"A request with id {request.id!r} is already running.", param="request_id")
        self._requests[request.id] = request
        self.waiting.push(request)

    def finish(self, request: Request, reason: FinishReason, *, stop_reason: str | int | None = None) -> None:
        """End a request in whatever state it is, and take back all that it holds. Ending it twice is fine."""
        if request.finished:
            return
        if request.state is State.RUNNING:
            self._release(request, forget=reason == "error")
        else:
            self.waiting.remove(request)
        request.move(State.FINISHED)
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.timing.finish_reason = reason
        request.timing.finished = self._clock()
        del self._requests[request.id]

    # -- a step --------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: those who run go on, then those who wait come in.

        Requests that need the fewest tokens go first, so a long prompt in chunks fills the rest of
        the budget instead of holding up everybody's next token.
        """
        rows: dict[Request, Row] = {}
        admitted: list[Admission] = []
        budget = self._budget
        for request in sorted(self.running, key=lambda r: r.num_wanted):
            if budget == 0:
                break
            if request.state is not State.RUNNING:  # preempted for one before it
                continue
            if self._make_room(request, rows):
                rows[request] = self._row(request, budget)
            budget = self._budget - sum(row.count for row in rows.values())
        while budget > 0 and (newcomer := self._next_admissible()) is not None:
            admitted.append(self._admit(newcomer))
            rows[newcomer] = row = self._row(newcomer, budget)
            budget -= row.count
        self._step += 1
        return StepPlan(step=self._step, admitted=admitted, rows=list(rows.values()))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Committed]:
        """Book what a step computed and sampled. Finishes nothing but failed rows: ends are the engine's."""
        sampled = dict(zip(result.slots, result.tokens, strict=True))
        now = self._clock()
        committed: list[Committed] = []
        for row in plan.rows:
            request = self._by_slot[row.slot]
            if row.slot in result.failed:
                self.finish(request, "error")
                committed.append(Committed(request, None, result.failed[row.slot]))
                continue
            request.num_computed = row.start + row.count
            if request.timing.scheduled is None:
                request.timing.scheduled = now
            assert request.table is not None
            self.blocks.index(request.table, request.tokens, request.num_computed)
            if row.sample:
                token = sampled[row.slot]
                request.tokens.append(token)
                request.timing.generated_tokens += 1
                committed.append(Committed(request, token))
        return committed

    # -- parts ---------------------------------------------------------------------------------

    def _row(self, request: Request, budget: int) -> Row:
        """As much of what the request wants as fits; tells the worker of blocks it does not know yet."""
        assert request.table is not None
        assert request.slot is not None
        count = min(request.num_wanted, self._chunk, budget)
        new_blocks = request.table.blocks[request.num_sent_blocks :]
        request.num_sent_blocks = len(request.table.blocks)
        return Row(
            slot=request.slot,
            start=request.num_computed,
            count=count,
            sample=count == request.num_wanted,
            new_blocks=new_blocks,
        )

    def _make_room(self, request: Request, rows: dict[Request, Row]) -> bool:
        """Blocks for all tokens of a running request, preempting others; False when it had to go itself."""
        assert request.table is not None
        while not self.blocks.can_grow(request.table, len(request.tokens)):
            victim = self.waiting.victim(self.running)
            rows.pop(victim, None)
            self._preempt(victim)
            if victim is request:
                return False
        self.blocks.grow(request.table, len(request.tokens))
        return True

    def _next_admissible(self) -> Request | None:
        """The next waiting request, if a slot and blocks for all its tokens are there.

        Blocks for the whole prompt are taken at once, although it may be computed in chunks: a
        request that comes in can always finish its prompt, and two prompts never starve each other.
        """
        if not self.waiting or not self._free_slots:
            return None
        request = self.waiting.peek()
        submission = request.submission
        match = self.blocks.match(request.tokens, adapter=submission.adapter, salt=submission.cache_salt)
        if not self.blocks.can_adopt(match, len(request.tokens)):
            return None
        request.table = self.blocks.adopt(match, len(request.tokens))
        request.num_computed = match.num_tokens
        if request.state is State.WAITING:
            request.timing.cached_tokens = match.num_tokens
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += match.num_tokens
        return request

    def _admit(self, request: Request) -> Admission:
        assert request.table is not None
        self.waiting.remove(request)
        request.move(State.RUNNING)
        request.slot = self._free_slots.pop()
        self._by_slot[request.slot] = request
        self.running.append(request)
        request.num_sent_blocks = len(request.table.blocks)
        return Admission(
            slot=request.slot,
            token_ids=list(request.tokens),
            prompt_len=request.prompt_len,
            block_ids=list(request.table.blocks),
            params=request.params,
            seed=request.seed,
            suppressed_ids=request.suppressed_ids,
            adapter=request.submission.adapter,
        )

    def _preempt(self, request: Request) -> None:
        """Take slot and blocks away. What was computed stays findable, so resuming is mostly cached."""
        self._release(request, forget=False)
        request.num_computed = 0
        request.move(State.PREEMPTED)
        request.timing.preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    def _release(self, request: Request, *, forget: bool) -> None:
        assert request.table is not None
        assert request.slot is not None
        self.blocks.free(request.table, forget=forget)
        request.table = None
        del self._by_slot[request.slot]
        self._free_slots.append(request.slot)
        request.slot = None
        self.running.remove(request)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when slots, queues and tables disagree."""
        self.blocks.check_integrity()
        assert len(self._free_slots) + len(self.running) == self._max_running, "a slot is lost"
        assert {r.slot: r for r in self.running} == self._by_slot, "slots and running requests differ"
        assert set(self.running) | set(self.waiting) == set(self._requests.values()), "a request is lost"
        if not self._requests:
            assert self.blocks.num_free == self.blocks.num_blocks, "blocks are held by nobody"
