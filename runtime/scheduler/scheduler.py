"""The token-step scheduler.

There is no prefill phase and no decode phase. Every request has tokens that are known and tokens
that are computed, and each step lets some requests catch up by some tokens, within a budget.
A step is `schedule` (a plan), then `commit` (what came of it). The next one may be planned in between: a plan
books its rows as if they were done, and what its result says of a request that has ended meanwhile, or has
lost its blocks, is dropped. That is safe because steps are executed in the order of their plans: whoever gets a
block writes to it after all who had it before. Knows neither tensors nor text.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, ValuesView
from dataclasses import dataclass

from msgspec.structs import replace

from runtime.blocks import BlockManager, SwapSpace
from runtime.errors import Conflict
from runtime.messages import FinishReason, Row, StepPlan, StepResult
from runtime.scheduler.admission import Admission
from runtime.scheduler.counts import Counts
from runtime.scheduler.deadlines import Deadlines
from runtime.scheduler.drafts import Speculation
from runtime.scheduler.keeping import Keeping, Recompute, Swap
from runtime.scheduler.pace import Pace
from runtime.scheduler.planner import Planner
from runtime.scheduler.planning import Stay
from runtime.scheduler.policies import Policy
from runtime.scheduler.preemption import Preemption
from runtime.scheduler.queue import Queue
from runtime.scheduler.request import Request, State
from runtime.scheduler.running import Running


@dataclass(slots=True)
class Committed:
    """What a step added to one request: new tokens, or its end without one."""

    request: Request
    tokens: list[int]
    error: str | None = None
    candidates: list[tuple[int, float]] | None = None
    """A beam's likeliest next tokens, and their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that was made and is not committed."""

    step: int
    planned: float
    """When."""
    stays: dict[int, Stay]
    """Whom each slot's row is for."""


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
        max_waiting_tokens: int | None = None,
        max_prefill_chunk: int | None = None,
        max_preemptions: int = 4,
        speculation: Speculation | None = None,
        sliding_window: int | None = None,
        swap: SwapSpace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sliding_window`: a token attends to so many at most, itself included; None for all before it.
        `swap`: where the KV of those that are preempted is kept; None: it is computed again."""
        self.blocks = blocks
        self.policy = policy
        self.counts = Counts()
        self._window = sliding_window
        self._speculation = speculation
        self._clock = clock
        self._pace = Pace()
        self.waiting = Queue(policy, Admission(max_waiting, max_waiting_tokens), self._pace)
        self._running = Running(blocks, max_running)
        self._keeping: Keeping = Recompute() if swap is None else Swap(swap, blocks.block_size, self.counts)
        self._planner = Planner(
            blocks,
            policy,
            self.waiting,
            self._running,
            budget=max_batched_tokens,
            chunk=min(max_prefill_chunk or max_batched_tokens, max_batched_tokens),
            preemption=Preemption(policy, max_preemptions),
            keeping=self._keeping,
            speculation=speculation,
            pace=self._pace,
            counts=self.counts,
            end=self._end,
        )
        self._deadlines = Deadlines()
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self._ended: list[Committed] = []
        """Requests that the scheduler itself has ended since the last commit."""
        self._step = 0
        self._flights: deque[Flight] = deque()
        self._last_commit = -math.inf

    # -- requests ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    @property
    def running(self) -> ValuesView[Request]:
        """In order of admission."""
        return self._running.requests

    @property
    def step_seconds(self) -> float:
        """What a step usually takes; 0 until there was one."""
        return self._pace.step_seconds

    @property
    def num_preemptions(self) -> int:
        return self.counts.preemptions

    @property
    def num_swapped(self) -> int:
        """Blocks in host memory that preempted sequences are kept in."""
        return self._keeping.num_held

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def check_room(self, num_tokens: int, *, num_requests: int = 0) -> None:
        """Raise `TooManyRequests` when the queue does not take a prompt of so many tokens. `num_requests`: how
        many there are, if the caller knows of some on their way here. Callable from any thread: it only reads."""
        self.waiting.check_room(num_tokens, self._clock(), at_least=num_requests - self._running.num_slots)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `TooManyRequests` when the queue is full, `Conflict` for an id in use."""
        self.check_room(len(request.tokens))
        if request.id in self._requests:
            raise Conflict(f"A request with id {request.id!r} is already running.", param="request_id")
        submission = request.submission
        request.order = next(self._arrivals)
        request.chain = self.blocks.chain(adapter=submission.adapter, salt=submission.cache_salt)
        self.waiting.add(request, self._requests.get(submission.fork_of))
        self._requests[request.id] = request
        self._deadlines.add(request, len(self._requests))

    def finish(self, request: Request, reason: FinishReason, *, stop_reason: str | int | None = None) -> None:
        """End a request in whatever state it is, and take back all that it holds. Ending it twice is fine."""
        if request.finished:
            return
        was_running = request.state is State.RUNNING
        request.end(reason, stop_reason, self._clock())
        if was_running:
            self._running.leave(request, forget=reason == "error")
        else:
            self.waiting.remove(request)
        del self._requests[request.id]
        self._keeping.drop(request)
        self.waiting.release(request)
        if reason in ("stop", "length"):
            self._pace.on_output(request.num_generated)

    # -- beams ---------------------------------------------------------------------------------

    def extend(self, request: Request, token: int) -> None:
        """A beam that has told its candidates goes on with `token`."""
        request.tokens.append(token)
        request.answered = False
        self.waiting.recall(request)
        self.policy.served(request, 0, 1)

    def branch(self, source: Request, request_id: str, token: int) -> Request:
        """A new beam: all of `source`, whose blocks it shares, and then `token`. It has the rank of its search, and
        no limit on the queue applies."""
        submission = replace(source.submission, request_id=request_id)
        beam = Request(submission, seed=source.seed, max_len=source.max_len)
        beam.stop_ids = source.stop_ids
        beam.tokens = [*source.tokens, token]
        beam.source, beam.num_shared = source, len(source.tokens)
        beam.order = source.order
        beam.chain = source.chain.copy() if source.chain else None
        self.waiting.push(beam)
        self._requests[request_id] = beam
        self._deadlines.add(beam, len(self._requests))
        self.policy.served(beam, 0, 1)
        return beam

    # -- a step --------------------------------------------------------------------------------

    @property
    def guesses(self) -> bool:
        """Would the next plan look for drafts? It needs every token for that, so nothing should be in flight."""
        rules = self._speculation
        return rules is not None and len(self._running) <= rules.max_running

    def schedule(self, *, ahead: bool = False) -> StepPlan:
        """Plan the next step. Without rows there is nothing to compute, but `commit` may have ends to tell.

        `ahead`: another plan may be made before this one is committed. So it has no drafts, of which nobody
        knows how many tokens they give. Plans are committed in their order; one that is left out, because the
        caller was interrupted, never will be.
        """
        now = self._clock()
        for late in self._deadlines.passed(now):
            self._end(late, "timeout")
        self._step += 1
        planning = self._planner.plan(self._step, now, guess=not ahead, idle=not self._flights)
        self._flights.append(Flight(self._step, now, planning.stays))
        return planning.done()

    def commit(self, plan: StepPlan, result: StepResult) -> list[Committed]:
        """Book what a step computed and sampled. Tells of new tokens, and of requests that the scheduler has
        ended: the late and the failed. All other ends are the engine's."""
        while (flight := self._flights.popleft()).step != plan.step:
            pass
        now = self._clock()
        self._pace.on_step(plan.num_tokens, len(plan.rows), now - max(flight.planned, self._last_commit))
        self._last_commit = now
        for slot, error in result.failed.items():
            self._fail(flight.stays[slot], error)
        committed, self._ended = self._ended, []
        sampled: dict[int, list[int]] = {}
        for slot, token in zip(result.slots, result.tokens, strict=True):
            sampled.setdefault(slot, []).append(token)
        stays, candidates, logprobs = flight.stays, result.candidates, result.logprobs
        for row in plan.rows:
            slot = row.slot
            if (stay := stays[slot]).over:
                continue
            request, tokens = stay.request, sampled.get(slot, [])
            self._book(request, row, tokens, now)
            if slot in candidates:
                request.answered = True
                committed.append(Committed(request, [], candidates=candidates[slot]))
            elif tokens:
                if logprobs:
                    request.cumulative_logprob += logprobs.get(slot, 0.0)
                committed.append(Committed(request, tokens))
        return committed

    def _book(self, request: Request, row: Row, tokens: list[int], now: float) -> None:
        """`row` was computed and gave `tokens`: one, or with a draft one more than proved right."""
        assert request.table is not None
        assert request.chain is not None
        if request.timing.scheduled is None:
            request.timing.scheduled = now
        request.num_written = row.start + row.count
        request.num_pending -= len(tokens) > 0
        if row.draft:
            # What was computed for wrong guesses is overwritten by the next row, and never findable.
            request.num_written -= len(row.draft) + 1 - len(tokens)
            request.num_computed = request.num_written
            self._learn(request, row, len(tokens) - 1)
        request.tokens += tokens
        self.policy.served(request, 0, len(tokens))
        if request.num_written >= (request.table.num_indexed + 1) * self.blocks.block_size:
            self.blocks.index(request.table, request.tokens, request.num_written, request.chain)
        if self._window is not None:
            self.blocks.drop_behind(request.table, request.num_written - self._window + 1)
        if self.waiting.num_deferred and request.num_written >= request.prompt_len:
            self.waiting.release(request)

    def _fail(self, stay: Stay, error: str) -> None:
        """A row could not be computed. What lies in its blocks may be garbage, whoever has them now."""
        self.blocks.forget(stay.table)
        if not stay.request.finished:
            self._end(stay.request, "error", error)

    def _learn(self, request: Request, row: Row, num_accepted: int) -> None:
        assert request.drafter is not None
        request.drafter.learn(len(row.draft), num_accepted, len(request.tokens) + num_accepted + 1)
        self.counts.drafted += len(row.draft)
        self.counts.accepted += num_accepted

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request that the engine believes to go on; the next commit tells of it."""
        self.finish(request, reason)
        self._ended.append(Committed(request, [], error))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when slots, queues and tables disagree."""
        self._running.check_integrity()
        self._keeping.check_integrity()
        self.waiting.check_integrity()
        places = [*self._running.requests, *self.waiting]
        assert len(places) == len(set(places)), "a request is in two places"
        assert set(places) == set(self._requests.values()), "a request is lost"
