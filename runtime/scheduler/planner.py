"""Makes a step's plan: who goes on, who takes whose place, who comes in."""

import contextlib
from typing import Protocol

from runtime.blocks import BlockManager
from runtime.messages import FinishReason, Move
from runtime.scheduler.counts import Counts
from runtime.scheduler.drafts import Drafter, Speculation
from runtime.scheduler.entry import take_entry
from runtime.scheduler.keeping import Keeping
from runtime.scheduler.pace import Pace
from runtime.scheduler.planning import Planning
from runtime.scheduler.policies import Policy
from runtime.scheduler.preemption import Preemption
from runtime.scheduler.queue import Queue
from runtime.scheduler.request import Request, State
from runtime.scheduler.running import Running

INTERNAL_ERROR = "An internal error ended this request; the others go on."


class End(Protocol):
    """How the planner ends a request that cannot or need not go on."""

    def __call__(self, request: Request, reason: FinishReason, error: str | None = None) -> None: ...


class Planner:
    """Works on the scheduler's queue and running requests. Keeps nothing from one step to the next."""

    def __init__(
        self,
        blocks: BlockManager,
        policy: Policy,
        queue: Queue,
        running: Running,
        *,
        budget: int,
        chunk: int,
        preemption: Preemption,
        keeping: Keeping,
        speculation: Speculation | None,
        pace: Pace,
        counts: Counts,
        end: End,
    ) -> None:
        """`budget`: tokens a step; `chunk`: tokens of one request a step."""
        self._blocks = blocks
        self._policy = policy
        self._queue = queue
        self._running = running
        self._budget = budget
        self._chunk = chunk
        self._preemption = preemption
        self._keeping = keeping
        self._speculation = speculation
        self._pace = pace
        self._counts = counts
        self._end = end

    def plan(self, step: int, now: float, *, guess: bool, idle: bool) -> Planning:
        """Those who run go on, then those who wait come in, until the budget, the slots or the blocks are used up.
        Without `guess` nobody drafts. `idle`: nothing is in flight."""
        planning = Planning(step, self._budget)
        if self._policy.preemptive:
            self._take_places(planning, now)
        self._go_on(planning, self._speculation if guess else None)
        while planning.budget > 0 and (head := self._head(now)) is not None and self._let_in(head, planning, now):
            self._add(head, planning)
        if idle and not planning.num_rows:
            self._clear_the_way(planning, now)
        return planning

    # -- who goes on ---------------------------------------------------------------------------

    def _go_on(self, planning: Planning, speculation: Speculation | None) -> None:
        """Rows for those that run. A next token goes before a prompt, and of prompts the better ranked one,
        then the shorter one: a long prompt in chunks fills what is left, instead of holding up all others."""
        size = self._blocks.block_size
        behind: list[Request] = []
        for request in list(self._running.requests):
            if request.state is not State.RUNNING:  # preempted for one before it
                continue
            wanted = request.num_wanted
            if wanted != 1:
                if wanted:
                    behind.append(request)
                continue
            if planning.budget == 0:
                return
            assert request.table is not None
            if request.num_computed < len(request.table.blocks) * size or self._make_room(request, planning):
                planning.add(request, 1, self._draft(request, planning, speculation) if speculation else [])
        behind.sort(key=lambda request: (self._policy.rank(request), request.num_wanted))
        for request in behind:
            if request.state is State.RUNNING and planning.budget > 0:
                self._add(request, planning)

    def _add(self, request: Request, planning: Planning) -> None:
        """As much of what the request wants as one step gives it."""
        planning.add(request, min(request.num_wanted, self._chunk, planning.budget), [])

    def _make_room(self, request: Request, planning: Planning) -> bool:
        """Blocks for all tokens of a running request, preempting others; False when it had to go itself."""
        assert request.table is not None
        while not self._blocks.can_grow(request.table, request.length):
            victim = self._preemption.victim(self._running.requests)
            self._preempt(victim, planning)
            if victim is request:
                return False
        try:
            self._blocks.grow(request.table, request.length)
        except Exception:
            planning.withdraw(request)
            self._end(request, "error", INTERNAL_ERROR)
            return False
        return True

    def _draft(self, request: Request, planning: Planning, rules: Speculation) -> list[int]:
        """Guesses at what follows, as many as the budget leaves to spare and blocks are free for."""
        unfit = request.submission.scored or request.submission.beams or request.num_pending
        if unfit or len(self._running) > rules.max_running or request.table is None:
            return []
        if request.drafter is None:
            request.drafter = Drafter(rules)
        length = len(request.tokens)
        spare = min(planning.budget - len(self._running), request.max_len - length - 1)
        draft = request.drafter.propose(request.tokens, spare)
        if draft and self._blocks.can_grow(request.table, length + len(draft)):
            with contextlib.suppress(Exception):  # then there is less to guess; nothing is owed
                self._blocks.grow(request.table, length + len(draft))
        return draft[: len(request.table.blocks) * self._blocks.block_size - length]

    # -- who comes in --------------------------------------------------------------------------

    def _head(self, now: float) -> Request | None:
        """The one that should come in next. Those that are not worth starting are ended on the way."""
        while (head := self._queue.head()) is not None and self._policy.hopeless(head, now, self._pace):
            self._end(head, "timeout")
        return head

    def _let_in(self, request: Request, planning: Planning, now: float) -> bool:
        """Give a waiting request a slot and blocks; False when one of the two is not there."""
        if self._running.full:
            return False
        try:
            entry = take_entry(self._blocks, request, self._preemption.tokens_to_hold(request))
        except Exception:
            self._end(request, "error", INTERNAL_ERROR)
            return False
        if entry is None:
            return False
        self._queue.remove(request)
        self._pace.on_admission(len(request.tokens), now)
        first = request.state is State.WAITING
        if not (first and request.is_branch):
            self._counts.prefix_queries += len(request.tokens)
            self._counts.prefix_hits += entry.num_computed
        if first and not request.is_branch:
            request.timing.cached_tokens = entry.num_computed
            self._policy.served(request, request.prompt_len, 0)
        planning.move(Move("copy", source, target) for source, target in entry.copies)
        entry, moves = self._keeping.restore(request, entry)
        planning.move(moves)
        self._running.enter(request, entry)
        planning.admit(request)
        return True

    # -- who gives way -------------------------------------------------------------------------

    def _take_places(self, planning: Planning, now: float) -> None:
        """Let those come in who may take the places of others, as long as that gives them room."""
        while (head := self._head(now)) is not None:
            victims = self._preemption.outranked(head, self._running.requests)
            held = sum(len(victim.table.held) for victim in victims if victim.table is not None)
            wanted = self._blocks.blocks_for(self._preemption.tokens_to_hold(head))
            if not victims or wanted > self._blocks.num_free + held:
                return
            while not self._let_in(head, planning, now):
                if head.finished or not victims:
                    return
                self._preempt(victims.pop(), planning)

    def _clear_the_way(self, planning: Planning, now: float) -> None:
        """Nobody can go on. Where that is because beams keep slots or blocks while they wait for a sibling that
        does not get in, they give them up, one by one: what they have told is not lost."""
        idle = sorted((r for r in self._running.requests if r.answered), key=self._preemption.standing)
        while idle and (head := self._head(now)) is not None:
            self._preempt(idle.pop(), planning, counts=False)
            if self._let_in(head, planning, now):
                self._add(head, planning)
                return

    def _preempt(self, request: Request, planning: Planning, *, counts: bool = True) -> None:
        """Take slot and blocks away. What was computed stays findable, so resuming is mostly cached.
        With `counts` it comes closer to the number after which nobody may do that to it."""
        planning.withdraw(request)
        planning.move(self._keeping.keep(request))
        self._running.leave(request)
        request.move(State.PREEMPTED)
        request.forget_progress()
        request.timing.preemptions += counts
        self._counts.preemptions += 1
        self._queue.push(request)
