"""A step's plan: which running requests continue, which are preempted, which waiting ones are admitted."""

import contextlib
import math
from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from runtime.blocks import BlockTable
from runtime.messages import Admission, FinishReason, Move, RidingRow, Row, StepPlan
from runtime.scheduler.drafts import Drafter, Speculation
from runtime.scheduler.pace import MIN_PROMPT_TOKENS, PromptPace, SchedulerCounts
from runtime.scheduler.queue import Queue
from runtime.scheduler.request import Request, RequestState
from runtime.scheduler.running import PreemptionBackend, RunningRequests, VictimSelection, allocate
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from settings.schema import SchedulerSettings

# -- plans -----------------------------------------------------------------------------------------
#
# A step's plan while it is being made: rows can still be withdrawn when their request is preempted.


class SlotLease(Struct, frozen=True):
    """A request's hold on its slot. It has expired when the request has another table or none: then the request has
    ended or was preempted since, and results for it are dropped."""

    request: Request
    table: BlockTable
    """The table that the request had when the row was planned."""


class Planning:
    """Rows within a budget of tokens, and the data that workers need before they compute them."""

    def __init__(self, step: int, budget: int, *, alone: bool = False) -> None:
        """`alone`: the plan is committed before the next one is made, so its rows may give any number of tokens."""
        self.step = step
        self.budget = budget
        """Tokens that may still be added."""
        self._alone = alone
        self._prompt_seconds = math.inf
        """Time that prompts may still take."""
        self._any_prompt = False
        self._rows: dict[int, Row] = {}
        self._leases: dict[int, SlotLease] = {}
        self._admitted: dict[int, Admission] = {}
        self._moves: list[Move] = []
        self._riding: RidingRow | None = None

    def ride(self, row: RidingRow) -> None:
        """Compute tokens of training beside the rows."""
        self._riding = row
        self.budget -= row.count

    def move(self, moves: Iterable[Move]) -> None:
        """Copy blocks, after all copies that were planned before. Never withdrawn: a copy that has become useless
        does no harm, as the next owner of its target writes to it later."""
        self._moves += moves

    def admit(self, request: Request) -> None:
        """Send the workers a request that has just been given its slot and its table."""
        assert request.slot is not None
        assert request.table is not None
        request.num_sent_blocks = len(request.table.blocks)
        request.num_sent_tokens = len(request.tokens)
        self._admitted[request.slot] = Admission(
            slot=request.slot,
            token_ids=list(request.tokens),
            prompt_len=request.prompt_len,
            block_ids=list(request.table.blocks),
            params=request.params,
            seed=request.seed,
            suppressed_ids=request.suppressed_ids,
            adapter=request.submission.adapter,
            num_logprobs=request.num_logprobs,
            prompt_logprobs=request.params.prompt_logprobs if request.scores_prompt else None,
            bad_word_ids=request.bad_word_ids,
            pooling=request.submission.pooling,
            candidates=request.candidates,
            grammar=request.submission.grammar,
        )

    def add(self, request: Request, count: int, draft: list[int]) -> None:
        """Plan `count` of the tokens that the request has to compute, and then those of `draft`. They are booked as if
        they were done; the commit of the step settles the result."""
        slot, table, start, submission = request.slot, request.table, request.num_computed, request.submission
        assert slot is not None
        assert table is not None
        new_blocks: list[int] = []
        if request.num_sent_blocks < (known := len(table.blocks)):
            new_blocks, request.num_sent_blocks = table.blocks[request.num_sent_blocks :], known
        total = count + len(draft)
        sample = start + count == len(request.tokens) + request.num_pending
        new_token_ids: list[int] = []
        if submission.beams is not None:
            new_token_ids, request.num_sent_tokens = request.tokens[request.num_sent_tokens :], len(request.tokens)
        elif submission.pooling is None:
            request.num_pending += sample
        self._rows[slot] = Row(
            slot=slot,
            start=start,
            count=total,
            sample=sample,
            new_blocks=new_blocks,
            draft=draft,
            new_token_ids=new_token_ids,
            forces=sample and self._alone and request.may_be_forced,
        )
        self._leases[slot] = SlotLease(request, table)
        request.num_computed = start + total
        self.budget -= total

    def withdraw(self, request: Request) -> None:
        """The request is about to lose its slot. What was planned for it is not to happen."""
        slot = request.slot
        assert slot is not None
        row = self._rows.pop(slot, None)
        self._leases.pop(slot, None)
        if row is not None:
            self.budget += row.count
        self._admitted.pop(slot, None)

    # -- prompts beside streams ------------------------------------------------------------------

    def limit_prompts(self, seconds: float) -> None:
        """Prompts that are added from here on may take that long together."""
        self._prompt_seconds = seconds

    @property
    def takes_prompts(self) -> bool:
        """True if a prompt may be added. One always may: else none would ever end where the limit is too low."""
        return self.budget > 0 and (self._prompt_seconds > 0 or not self._any_prompt)

    def chunk(self, wanted: int, context: int, pace: PromptPace) -> int:
        """Tokens of the `wanted` ones, after `context`, that a prompt gets in this step. To be added."""
        count = min(wanted, self.budget)
        if self._prompt_seconds < math.inf:
            count = min(count, max(pace.tokens_in(self._prompt_seconds, context), MIN_PROMPT_TOKENS))
            self._prompt_seconds -= pace.seconds_of(count, context)
        self._any_prompt = True
        return count

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def decodes(self) -> bool:
        """True if the plan does nothing but decode."""
        return (
            bool(self._rows)
            and not self._admitted
            and all(row.sample and row.count == 1 + len(row.draft) for row in self._rows.values())
        )

    @property
    def leases(self) -> dict[int, SlotLease]:
        """Leases by the slots of the rows."""
        return self._leases

    def done(self) -> StepPlan:
        return StepPlan(
            step=self.step,
            admitted=list(self._admitted.values()),
            rows=list(self._rows.values()),
            moves=self._moves,
            riding=self._riding,
        )


INTERNAL_ERROR = "An internal error ended this request; the others go on."

log = get_logger(__name__)


class End(Protocol):
    """Ends a request that cannot continue, or need not."""

    def __call__(self, request: Request, reason: FinishReason, error: str | None = None) -> None: ...


class Planner:
    """Makes plans from the scheduler's queue and running requests. Holds no state between steps."""

    def __init__(
        self,
        queue: Queue,
        running: RunningRequests,
        settings: SchedulerSettings,
        *,
        backend: PreemptionBackend,
        speculation: Speculation | None,
        counts: SchedulerCounts,
        end: End,
    ) -> None:
        self._queue = queue
        self._policy = queue.policy
        self._pace = queue.pace
        self._running = running
        self._blocks = running.blocks
        self._budget = settings.max_batched_tokens
        self._chunk = min(settings.max_prefill_chunk or self._budget, self._budget)
        self._victims = VictimSelection(queue.policy, settings.max_preemptions)
        self._backend = backend
        self._speculation = speculation
        self._counts = counts
        self._end = end

    def plan(self, step: int, now: float, *, guess: bool, idle: bool, riding: RidingRow | None = None) -> Planning:
        """Continue running requests, then admit waiting ones, until the budget, the slots or the blocks are used up.
        Without `guess` there are no drafts. `idle`: no step is in flight. `riding` tokens come after all others, in
        steps that do nothing but decode, if there is room."""
        planning = Planning(step, self._budget, alone=guess)
        if self._policy.preemptive:
            self._free_place(planning)
            self._replace_outranked(planning, now)
        self._continue_running(planning, self._speculation if guess else None)
        while planning.takes_prompts and (head := self._head(now)) is not None and self._try_admit(head, planning, now):
            self._add(head, planning)
        if idle and not planning.num_rows:
            self._break_deadlock(planning, now)
        if riding is not None and planning.decodes and riding.count <= planning.budget:
            table = self._running.riding.hold(riding, len(self._running))
            if table is not None:
                planning.ride(replace(riding, blocks=list(table.blocks)))
        return planning

    # -- running requests ---------------------------------------------------------------------------

    def _continue_running(self, planning: Planning, speculation: Speculation | None) -> None:
        """Add rows for running requests. Decoding goes before prompts, and prompts go by rank, then by length: a long
        prompt in chunks fills what is left of the budget, instead of delaying all others."""
        size, running = self._blocks.block_size, RequestState.RUNNING
        behind: list[Request] = []
        for request in list(self._running.requests):
            if request.state is not running:  # preempted by an earlier one
                continue
            wanted = request.num_wanted
            if wanted != 1:
                if wanted:
                    behind.append(request)
                continue
            if planning.budget == 0:
                return
            assert request.table is not None
            try:
                if request.num_computed < len(request.table.blocks) * size or self._make_room(request, planning):
                    planning.add(request, 1, self._draft(request, planning, speculation) if speculation else [])
            except Exception:
                self._fail(request, planning)
        planning.limit_prompts(self._pace.prompts.seconds_beside(planning.num_rows))
        behind.sort(key=lambda request: (self._policy.rank(request), request.num_wanted))
        for request in behind:
            if request.state is RequestState.RUNNING and planning.takes_prompts and self._has_room(request, planning):
                self._add(request, planning)

    def _add(self, request: Request, planning: Planning) -> None:
        """Add as many of the request's tokens as one step allows, and its streams."""
        try:
            wanted = min(request.num_wanted, self._chunk)
            planning.add(request, planning.chunk(wanted, request.num_computed, self._pace.prompts), [])
        except Exception:
            self._fail(request, planning)

    def _fail(self, request: Request, planning: Planning | None = None) -> None:
        """End a request that cannot be planned, and only that one. Called while its exception is handled."""
        log.exception("planning_failed", request_id=request.submission.request_id)
        if planning is not None and request.state is RequestState.RUNNING:
            planning.withdraw(request)
        self._end(request, "error", INTERNAL_ERROR)

    def _has_room(self, request: Request, planning: Planning) -> bool:
        """True if there are blocks for all tokens of a running request: a prompt has them since its admission, forced
        tokens may need more."""
        assert request.table is not None
        try:
            enough = request.length <= len(request.table.blocks) * self._blocks.block_size
            return enough or self._make_room(request, planning)
        except Exception:
            self._fail(request, planning)
            return False

    def _make_room(self, request: Request, planning: Planning) -> bool:
        """Allocate blocks for all tokens of a running request, preempting others; False if it was preempted itself."""
        assert request.table is not None
        while not self._blocks.can_grow(request.table, request.length):
            if self._running.riding.evict():
                continue
            victim = self._victims.victim(self._running.requests)
            self._preempt(victim, planning)
            if victim is request:
                return False
        self._blocks.grow(request.table, request.length)
        return True

    def _draft(self, request: Request, planning: Planning, rules: Speculation) -> list[int]:
        """Draft tokens, as many as the budget and the free blocks allow."""
        submission = request.submission
        unfit = submission.beams or submission.pooling or request.num_pending
        if unfit or len(self._running) > rules.max_running or request.table is None:
            return []
        if request.drafter is None:
            request.drafter = Drafter(rules)
        length = len(request.tokens)
        spare = min(planning.budget - len(self._running), request.max_len - length - 1)
        draft = request.drafter.propose(request.tokens, spare)
        if draft and self._blocks.can_grow(request.table, length + len(draft)):
            with contextlib.suppress(Exception):  # then the draft is shorter
                self._blocks.grow(request.table, length + len(draft))
        return draft[: len(request.table.blocks) * self._blocks.block_size - length]

    # -- admission --------------------------------------------------------------------------

    def _head(self, now: float) -> Request | None:
        """The waiting request to admit next. Requests that the policy sheds are ended on the way."""
        while (head := self._queue.head()) is not None:
            try:
                if not self._policy.should_shed(head, now, self._pace):
                    return head
                self._end(head, "timeout")
            except Exception:
                self._fail(head)
        return None

    def _try_admit(self, request: Request, planning: Planning, now: float) -> bool:
        """Give a waiting request a slot and blocks; False when either is lacking."""
        if self._running.full:
            return False
        try:
            return self._admit(request, planning, now)
        except Exception:
            self._fail(request, planning)
            return False

    def _admit(self, request: Request, planning: Planning, now: float) -> bool:
        """Move a waiting request to a free slot, if there are blocks for it."""
        failpoint("planner.enter", request.submission.request_id)
        wanted = self._victims.tokens_to_hold(request)
        allocation = allocate(self._blocks, request, wanted)
        if allocation is None and self._running.riding.evict():
            allocation = allocate(self._blocks, request, wanted)
        if allocation is None:
            return False
        first = request.state is RequestState.WAITING
        try:
            allocation, moves = self._backend.restore(request, allocation)
            self._queue.remove(request)
            self._running.enter(request, allocation)
        except Exception:
            self._blocks.free(allocation.table, forget=True)
            raise
        self._pace.on_admission(len(request.tokens), now)
        if not (first and request.is_branch):
            self._counts.prefix_queries += len(request.tokens)
            self._counts.prefix_hits += allocation.num_computed
        if first and not request.is_branch:
            request.timing.cached_tokens = allocation.num_computed
            self._policy.served(request, request.prompt_len, 0)
        planning.move(Move("copy", source, target) for source, target in allocation.copies)
        planning.move(moves)
        planning.admit(request)
        return True

    # -- preemption -------------------------------------------------------------------------

    def _replace_outranked(self, planning: Planning, now: float) -> None:
        """Admit waiting requests in place of running ones that they outrank, where that makes enough room."""
        while (head := self._head(now)) is not None:
            try:
                victims = self._victims.outranked(head, self._running.requests)
            except Exception:
                self._fail(head, planning)
                continue
            held = sum(len(victim.table.held) for victim in victims if victim.table is not None)
            wanted = self._blocks.blocks_for(self._victims.tokens_to_hold(head))
            held += self._running.riding.num_held
            if not victims or wanted > self._blocks.num_free + held:
                return
            while not self._try_admit(head, planning, now):
                if head.finished or not victims:
                    return
                self._preempt(victims.pop(), planning)

    def _free_place(self, planning: Planning) -> None:
        """Preempt all requests of an adapter version that a request which waits for a place outranks."""
        adapters = self._queue.adapters
        if (waiting := adapters.first_without_place) is None:
            return
        users: dict[str, list[Request]] = {}
        for request in self._running.requests:
            users.setdefault(request.submission.adapter, []).append(request)
        for key, requests in users.items():
            outranked = adapters.may_lose(key) and self._victims.outranked(waiting, requests)
            if outranked and len(outranked) == len(requests):
                adapters.promise(key, waiting.submission.adapter)
                self._queue.defer(key)
                for request in outranked:
                    self._preempt(request, planning)
                return

    def _break_deadlock(self, planning: Planning, now: float) -> None:
        """Resolve a deadlock of beams, some of which wait for a sibling and hold slots or blocks that it needs. They
        are preempted one by one; their candidates are not lost."""
        idle = sorted((r for r in self._running.requests if r.awaiting_expansion), key=self._victims.standing)
        while idle and (head := self._head(now)) is not None:
            self._preempt(idle.pop(), planning, counts=False)
            if self._try_admit(head, planning, now):
                self._add(head, planning)
                return

    def _preempt(self, request: Request, planning: Planning, *, counts: bool = True) -> None:
        """Take slot and blocks away. Full blocks stay in the prefix cache, so resuming is mostly cached. `counts`: it
        counts towards the cap on preemptions."""
        planning.withdraw(request)
        planning.move(self._backend.save(request))
        self._running.leave(request)
        request.move(RequestState.PREEMPTED)
        request.forget_progress()
        request.timing.preemptions += counts
        self._counts.preemptions += 1
        self._queue.push(request)
