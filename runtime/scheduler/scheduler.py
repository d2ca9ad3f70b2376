"""The token-step scheduler.

There is no prefill phase and no decode phase. Every request has a number of tokens and a number of computed ones, and
each step lets some requests catch up by some tokens, within a budget. A step is `schedule` (a plan), then `commit` (its
result). The next one may be planned in between: a plan books its rows as if they were done, and results for a request
that has ended meanwhile, or has lost its blocks, are dropped. That is safe because steps are executed in the order of
their plans: the next owner of a block writes to it after all previous owners. Deals in ints, not in tensors or text.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, ValuesView
from dataclasses import dataclass

from msgspec import Struct
from msgspec.structs import replace

from runtime.blocks import BlockManager, SwapSpace
from runtime.errors import Conflict
from runtime.messages import FinishReason, RidingRow, Row, StepPlan, StepResult, TokenLogprob, new_sequence_id
from runtime.scheduler.adapters import AdapterPlaces
from runtime.scheduler.drafts import Speculation
from runtime.scheduler.pace import Pace, SchedulerCounts, StepWork
from runtime.scheduler.planner import INTERNAL_ERROR, Planner, SlotLease
from runtime.scheduler.policies import Policy
from runtime.scheduler.queue import Deadlines, Queue
from runtime.scheduler.request import Request, RequestState
from runtime.scheduler.running import PreemptionBackend, Recompute, RidingTables, RunningRequests, Swap
from runtime.support.failpoints import ENABLED, failpoint
from runtime.support.logs import get_logger
from settings.schema import AdapterSettings, SchedulerSettings

log = get_logger(__name__)


class Committed(Struct):
    """A step's addition to one request: new tokens, or its end without one."""

    request: Request
    tokens: list[int]
    error: str | None = None
    logprobs: list[TokenLogprob] = []
    """One for each of `tokens`, where they are asked for."""
    candidates: list[tuple[int, float]] | None = None
    """A beam's likeliest next tokens, and their log-probabilities."""
    pooled: list[float] | None = None
    """The pooled hidden states of a request that wants nothing else."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that was made and is not committed."""

    step: int
    planned: float
    """Time of the plan, of the scheduler's clock."""
    leases: dict[int, SlotLease]
    """Slot → the request that its row is for."""


def work_of(plan: StepPlan) -> StepWork:
    """The work of a plan: rows whose tokens are known but for a guess are streams."""
    streams = tokens = 0
    depth = 0.0
    for row in plan.rows:
        if row.count - len(row.draft) == 1:
            streams += 1
        else:
            tokens += row.count
            depth += row.count * (row.start + row.count / 2)
    return StepWork(streams, tokens, depth)


class Scheduler:
    """Owns every request that is not finished, the slots, and (through the manager) the blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        policy: Policy,
        settings: SchedulerSettings,
        *,
        speculation: Speculation | None = None,
        sliding_window: int | None = None,
        swap: SwapSpace | None = None,
        adapters: AdapterSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sliding_window`: most tokens that a token attends to, itself included; None for all before it.
        `swap`: host memory for the KV of preempted requests; None: it is recomputed. `adapters`: limits of
        `adapters`; default: those of the settings."""
        self.blocks = blocks
        self.policy = policy
        self.counts = SchedulerCounts()
        self._window = sliding_window
        self._speculation = speculation
        self._clock = clock
        self._pace = Pace(settings.tpot_target, settings.tpot_percentile)
        limits = adapters or AdapterSettings()
        self.adapters = AdapterPlaces(limits.max_loaded, limits.max_place_wait, clock=clock, rank=policy.rank)
        """Places of adapter versions in memory."""
        self.waiting = Queue(policy, settings, self._pace, self.adapters)
        self._running = RunningRequests(blocks, settings.max_running, self.adapters)
        self._backend: PreemptionBackend = Recompute() if swap is None else Swap(swap, blocks.block_size, self.counts)
        self._planner = Planner(
            self.waiting,
            self._running,
            settings,
            backend=self._backend,
            speculation=speculation,
            counts=self.counts,
            end=self._end,
        )
        self._deadlines = Deadlines()
        self._requests: dict[int, Request] = {}
        self._arrivals = itertools.count()
        self._ended: list[Committed] = []
        """Requests that the scheduler itself has ended since the last commit."""
        self._num_fresh = 0
        """Requests that were queued since the last plan."""
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
        """Running requests, in order of admission."""
        return self._running.requests

    @property
    def riding(self) -> RidingTables:
        """Blocks of sequences in training."""
        return self._running.riding

    @property
    def only_reads(self) -> bool:
        """True if there is nothing to compute before some adapter version is read."""
        return self.adapters.reads and not self._running.requests and not len(self.policy)

    @property
    def step_seconds(self) -> float:
        """Usual time of a step, in seconds; 0 before the first."""
        return self._pace.step_seconds

    @property
    def prompt_reserve(self) -> float:
        """Part of the time beside streams that is held back from prompts, as steps were late."""
        return self._pace.prompts.reserve

    @property
    def num_preemptions(self) -> int:
        return self.counts.preemptions

    @property
    def num_swapped(self) -> int:
        """Blocks in host memory that hold the KV of preempted sequences."""
        return self._backend.num_held

    def get(self, request_id: int) -> Request | None:
        return self._requests.get(request_id)

    def check_room(self, num_tokens: int, *, count: int = 1, num_requests: int | None = None) -> None:
        """Raise `TooManyRequests` when the queue does not take `count` sequences with prompts of `num_tokens` in all.
        `num_requests`: number of all sequences that a caller on another thread has, including those on their way here.
        With it, sequences that no plan has looked at yet do not count as far as there are free slots, which they may
        get at once. Callable from any thread: it only reads."""
        num_waiting = len(self.waiting) + count - 1
        if num_requests is not None:
            coming = max(0, num_requests - len(self._requests))
            num_waiting += coming - min(self._num_fresh + coming + count - 1, self._running.num_free)
        self.waiting.check_room(num_tokens, self._clock(), num_waiting=num_waiting)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `TooManyRequests` when the queue is full, `Conflict` for an id in use."""
        self.check_room(len(request.tokens))
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request for which `check_room` has found room. Raises `Conflict` for an id in use."""
        if request.id in self._requests:
            raise Conflict(f"Sequence {request.id} is already running.", param="request_id")
        submission = request.submission
        request.order = next(self._arrivals)
        request.chain = self.blocks.chain(adapter=submission.adapter, salt=submission.cache_salt)
        self.waiting.add(request, self._requests.get(submission.fork_of))
        self._requests[request.id] = request
        self._num_fresh += 1
        self._deadlines.add(request, len(self._requests))

    def finish(self, request: Request, reason: FinishReason, *, stop_reason: str | int | None = None) -> None:
        """End a request in any state, and free all that it holds. Ending it twice is fine."""
        if request.finished:
            return
        was_running = request.state is RequestState.RUNNING
        request.end(reason, stop_reason, self._clock())
        if was_running:
            self._running.leave(request, forget=reason == "error")
        else:
            self.waiting.remove(request)
        self._requests.pop(request.id, None)
        self._backend.drop(request)
        self.waiting.release(request)
        if reason in ("stop", "length"):
            self._pace.on_output(request.num_generated)

    # -- beams ---------------------------------------------------------------------------------

    def extend(self, request: Request, token: int) -> None:
        """Continue with `token` a beam that has given its candidates."""
        request.tokens.append(token)
        request.awaiting_expansion = False
        self.waiting.recall(request)
        self.policy.served(request, 0, 1)

    def branch(self, source: Request, token: int) -> Request:
        """A new beam: all of `source`, whose blocks it shares, and then `token`. It has the rank of its search, and
        no limit on the queue applies."""
        submission = replace(source.submission, id=new_sequence_id())
        beam = Request(submission, seed=source.seed, max_len=source.max_len)
        beam.stop_ids = source.stop_ids
        beam.tokens = [*source.tokens, token]
        beam.source, beam.num_shared = source, len(source.tokens)
        beam.order = source.order
        beam.chain = source.chain.copy() if source.chain else None
        self.waiting.push(beam)
        self._requests[beam.id] = beam
        self._deadlines.add(beam, len(self._requests))
        self.policy.served(beam, 0, 1)
        return beam

    # -- a step --------------------------------------------------------------------------------

    @property
    def guesses(self) -> bool:
        """True if the next plan would look for drafts. It needs every token for that, so nothing should be in
        flight."""
        rules = self._speculation
        return rules is not None and len(self._running) <= rules.max_running

    def schedule(self, *, ahead: bool = False, riding: RidingRow | None = None) -> StepPlan:
        """Plan the next step. Without rows there is nothing to compute, but `commit` may have ends to report.

        `ahead`: another plan may be made before this one is committed. So it has no drafts, as the number of tokens
        that they give is open until then, and nothing rides in it. `riding`: tokens of training to compute beside the
        requests', if there is room. Plans are committed in their order; a plan that is skipped because the caller
        was interrupted is never committed.
        """
        failpoint("scheduler.plan")
        now = self._clock()
        for late in self._deadlines.passed(now):
            self._end(late, "timeout")
        for request, error in self.adapters.take_lost():
            self._end(request, "error", error)
        for key in self.adapters.promise_places():
            self.waiting.defer(key)
        self._step += 1
        self._num_fresh = 0
        planning = self._planner.plan(self._step, now, guess=not ahead, idle=not self._flights, riding=riding)
        self._flights.append(Flight(self._step, now, planning.leases))
        return planning.done()

    def commit(self, plan: StepPlan, result: StepResult) -> list[Committed]:
        """Book what a step computed and sampled. Returns new tokens, and requests that the scheduler has ended: the
        late and the failed. All other ends are the engine's."""
        while (flight := self._flights.popleft()).step != plan.step:
            pass
        failpoint("scheduler.commit")
        now = self._clock()
        seconds = now - max(flight.planned, self._last_commit)
        self._pace.on_step(plan.num_tokens, len(plan.rows), seconds)
        if self._pace.prompts.learns:
            work = work_of(plan)
            late = self._pace.prompts.on_step(work, seconds)
            if work.streams and work.tokens:
                self.counts.paced_steps += 1
                self.counts.paced_tokens += work.tokens
                self.counts.late_steps += late
        self._last_commit = now
        if (ride := plan.riding) is not None and result.ridden and ride.start + ride.count == ride.length:
            self.riding.release(ride.ride)
        for slot, error in result.failed.items():
            self._fail(flight.leases[slot], error)
        committed: list[Committed] = []
        sampled: dict[int, list[int]] = {}
        for slot, token in zip(result.slots, result.tokens, strict=True):
            sampled.setdefault(slot, []).append(token)
        leases, candidates, logprobs = flight.leases, result.candidates, result.logprobs
        scored, pooled, all_forced = result.prompt_logprobs, result.pooled, result.forced
        for row in plan.rows:
            slot = row.slot
            lease = leases[slot]
            request, tokens = lease.request, sampled.get(slot, [])
            if request.table is not lease.table:  # it has ended or was preempted since
                continue
            try:
                self._book(request, row, tokens, now)
                if slot in scored:  # a prompt that is computed again, after a preemption, begins at its start
                    request.prompt_logprobs += scored[slot][len(request.prompt_logprobs) - row.start :]
            except Exception:
                log.exception("booking_failed", request_id=request.submission.request_id)
                self._fail(lease, INTERNAL_ERROR)
                continue
            if slot in pooled:
                committed.append(Committed(request, [], pooled=pooled[slot]))
            elif slot in candidates:
                request.awaiting_expansion = True
                committed.append(Committed(request, [], candidates=candidates[slot]))
            elif tokens:
                if forced := all_forced.get(slot):
                    request.tokens += forced
                    self.policy.served(request, 0, len(forced))
                    tokens = tokens + forced
                committed.append(Committed(request, tokens, logprobs=logprobs.get(slot, [])))
        ended, self._ended = self._ended, []
        return ended + committed

    def _book(self, request: Request, row: Row, tokens: list[int], now: float) -> None:
        """`row` was computed and gave `tokens`: one, or with a draft one more than proved right."""
        table, timing = request.table, request.timing
        assert table is not None
        assert request.chain is not None
        if ENABLED:
            failpoint("scheduler.book", request.submission.request_id)
        if timing.scheduled is None:
            timing.scheduled = now
        request.num_written = row.start + row.count
        if tokens:
            request.num_pending -= 1
        if row.draft:
            # What was computed for wrong guesses is overwritten by the next row, and never findable.
            request.num_written -= len(row.draft) + 1 - len(tokens)
            request.num_computed = request.num_written
            self._learn(request, row, len(tokens) - 1)
        request.tokens += tokens
        self.policy.served(request, 0, len(tokens))
        if request.num_written >= (table.num_indexed + 1) * self.blocks.block_size:
            self.blocks.index(table, request.tokens, request.num_written, request.chain)
        if self._window is not None:
            self.blocks.drop_behind(table, request.num_written - self._window + 1)
        if self.waiting.followers.count and request.num_written >= request.prompt_len:
            self.waiting.release(request)

    def _fail(self, lease: SlotLease, error: str) -> None:
        """A row could not be computed. Its blocks may hold garbage, even if another request has them now."""
        self.blocks.forget(lease.table)
        if not lease.request.finished:
            self._end(lease.request, "error", error)

    def abandon(self, *, waiting: bool = False) -> list[Committed]:
        """End every running request with an error, and with `waiting` all others too, after planning or booking has
        failed in a way that no single request explains. What steps in flight compute is dropped, every block and slot
        is free again and nothing is cached, whatever state the failure left them in."""
        lost = list(self._requests.values()) if waiting else list(self._running.requests)
        for request in lost:
            try:
                self.finish(request, "error")
            except Exception:
                log.exception("abandoning_failed", request_id=request.submission.request_id)
                request.fail()
                self._requests.pop(request.id, None)
        for request in self._requests.values():
            self._backend.drop(request)  # copies to host memory that the failed plan held were never made
        self._flights.clear()
        self._running.clear()
        self.blocks.clear()
        ended, self._ended = self._ended, []
        return ended + [Committed(request, [], INTERNAL_ERROR) for request in lost]

    def _learn(self, request: Request, row: Row, num_accepted: int) -> None:
        assert request.drafter is not None
        request.drafter.learn(len(row.draft), num_accepted, len(request.tokens) + num_accepted + 1)
        self.counts.drafts += 1
        self.counts.drafted += len(row.draft)
        self.counts.accepted += num_accepted

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request that still runs for the engine; the next commit reports it."""
        self.finish(request, reason)
        self._ended.append(Committed(request, [], error))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when slots, queues and tables disagree."""
        self._running.check_integrity()
        self._backend.check_integrity()
        self.waiting.check_integrity()
        places = [*self._running.requests, *self.waiting]
        assert len(places) == len(set(places)), "a request is in two places"
        assert set(places) == set(self._requests.values()), "a request is lost"
