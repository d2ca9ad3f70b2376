"""The engine thread's side of training: it holds the runs at work, gives each its share of the time, and has several go
through the base together (`OfferedMicro`)."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runtime.events import FailedEvent, RunEvent
from runtime.support.logs import get_logger
from runtime.support.memory import give_back_memory
from runtime.trainer.riding import Ride, RowPace
from runtime.trainer.sliced_run import SlicedRun
from runtime.trainer.slices import EMA_WEIGHT, FairQueue, TrainingShare
from runtime.trainer.step import MAX_JOINT_TOKENS, OfferedMicro

# Training between two looks at the inbox, when there are no requests.
IDLE_TURN_SECONDS = 0.05
# The longest slice then: what a first token may have to wait.
MAX_SLICE_SECONDS = 0.2

# Riding rows are taken to cost at most this many times the slack.
MOST_SLACKS = 2.0

log = get_logger(__name__)


@dataclass(frozen=True)
class _Offer:
    """A ride for one step."""

    run: SlicedRun
    ride: Ride
    count: int
    before: int
    """Tokens of it that were computed before."""


class TrainingHost:
    """`runtime.engine.service.Background` of runs that share the time, slice by slice.

    `attach` and `detach` are called on the engine thread.
    """

    def __init__(
        self,
        share: TrainingShare,
        on_slices: Callable[[float, float], None] = lambda seconds, slack_used: None,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        riding_rows: int = 0,
        kept_widths: Callable[[], tuple[int, int, int, int] | None] = lambda: None,
        on_ride: Callable[[int], None] = lambda tokens: None,
        joint_tokens: int = MAX_JOINT_TOKENS,
    ) -> None:
        """`on_slices` is called with the seconds of every stretch of training, and the part of the slack that training
        uses. Where `interrupted` is true, no slice begins. Up to `riding_rows` tokens ride in a step, where there are
        `kept_widths` (`KeptLayers`); `on_ride` is called with the number that did. `joint_tokens`: of a pass of several
        runs, at the most; 0: each goes alone."""
        self._share = share
        self._on_slices = on_slices
        self._interrupted = interrupted
        self._runs: dict[SlicedRun, Callable[[RunEvent], None]] = {}
        self._queue: FairQueue[SlicedRun] = FairQueue()
        self._joint_tokens = joint_tokens
        self._token_seconds = 0.0
        """Time of a token in a pass: smoothed; 0 while it is unknown, so that the first pass is of one run and waits
        for no other."""
        self._kept_widths = kept_widths
        self._on_ride = on_ride
        self._riding_rows = riding_rows if riding_rows > 1 else 0
        self._rows: RowPace | None = None
        """None: nothing has ridden yet."""
        self._offer: _Offer | None = None
        """The ride that the step which comes next, or has just been, was given."""

    @property
    def ready(self) -> bool:
        return any(run.ready for run in self._runs)

    def attach(
        self, run: SlicedRun, on_event: Callable[[RunEvent], None], *, weight: float = 1.0, priority: int = 0
    ) -> None:
        """`on_event` gets the errors that the run does not handle itself. `weight` and `priority`: see `FairQueue`."""
        self._runs[run] = on_event
        self._queue.add(run, weight=weight, priority=priority)
        self._have_passes_offered()
        if self._riding_rows and (widths := self._kept_widths()) is not None:
            run.ride_with(widths)

    def detach(self, run: SlicedRun) -> None:
        """Forget a run, wherever it is. One that is not attached is fine."""
        if self._runs.pop(run, None) is not None:
            self._queue.remove(run)
            run.pacer.close()
            self._have_passes_offered()

    def _have_passes_offered(self) -> None:
        """A run that is alone goes on without."""
        for run in self._runs:
            run.offers = len(self._runs) > 1

    def idle(self) -> None:
        self._offer = None
        for run in self._runs:
            run.beside_requests = False
            run.stop_riding()
        self._work(IDLE_TURN_SECONDS, longest=MAX_SLICE_SECONDS)

    def between_steps(self, step_seconds: float, *, decoding: bool, waiting_since: float | None) -> None:
        if not self.ready:
            return
        for run in self._runs:
            run.beside_requests = True
            if run.waits_for_ride and (ride := run.next_ride()) is not None and self._offer is None:
                ride.refuse()
        now, rode = time.monotonic(), self._settle_offer(step_seconds) if self._riding_rows else None
        budget = self._share.budget(step_seconds, decoding=decoding, waiting_since=waiting_since, now=now, rode=rode)
        self._share.settle(budget, self._work(budget) if budget > 0 else 0.0)

    def ride(self) -> tuple[Ride, int] | None:
        self._offer = None
        if not self._riding_rows or self._share.probes or self._share.typical is None:
            return None
        riding = {run: ride for run in self._runs if run.ready and (ride := run.next_ride()) is not None}
        if (run := self._queue.next_of(riding, self._wanting)) is None:
            return None
        price = run.forward_seconds
        if self._rows is None:
            self._rows = RowPace(self._riding_rows)
        count = self._rows.choose(price=math.inf if price is None else price, slack=self._share.slack)
        if count == 0:
            return None
        self._offer = _Offer(run, riding[run], count, riding[run].num_done)
        return riding[run], count

    def _settle_offer(self, step_seconds: float) -> float | None:
        """Learn from a step that a ride was given to; returns the part of its time that riding tokens took, None where
        there were none."""
        offer, self._offer = self._offer, None
        if offer is None or self._rows is None or (tokens := offer.ride.num_done - offer.before) <= 0:
            self._on_ride(0)
            return None
        self._on_ride(tokens)
        if self._share.typical is not None and tokens == offer.count:
            # One step that took ten times as long, because something else ran, does not tell what rows cost.
            self._rows.learn(tokens, min(step_seconds - self._share.typical, MOST_SLACKS * self._share.slack))
        cost = self._rows.cost(offer.count)
        self._queue.charge(offer.run, cost)
        return cost

    def _work(self, seconds: float, *, longest: float | None = None) -> float:
        """Let the run train that is next, or one after it where it has no slice that fits. Where a pass ends, or is to
        begin, the rest of the time goes to the run that is next then."""
        waiting = [run for run in self._runs if run.ready]
        total = 0.0
        while total < seconds and (run := self._next(waiting)) is not None:
            members = self._members(run)
            led = run.offered if run.offers and members else None
            spent = self._train(run, seconds - total, longest, led, rest=total > 0)
            if spent:
                self._charge(run, spent, members)
            if led is not None:
                self._learn_pass(led, spent)
            total += spent
            if not run.at_offer and (led is None or not led.done):
                if total:  # a rest goes to no other that has smaller slices
                    break
                waiting.remove(run)
        if total:
            self._on_slices(total, self._share.slack_used)
        return total

    @property
    def _wanting(self) -> list[SlicedRun]:
        """Runs that want time now: they have something to do, or another one computes their pass."""
        return [run for run in self._runs if run.ready or (run.offered is not None and run.offered.waits)]

    def _lane(self, run: SlicedRun) -> tuple[int, bool]:
        """Priority, and True before and in a pass that is too large to be shared: of each lane one pass at a time is
        under way."""
        return self._queue.priority(run), run.offered is not None and run.offered.tokens > self._joint_tokens

    def _next(self, waiting: Sequence[SlicedRun]) -> SlicedRun | None:
        """The run to work on; one that stands before its pass has begun it then.

        A pass that is under way goes first in its lane, and others begin none there: several at once would keep several
        times as much in memory. Lanes take turns, so that a small job does not wait for the end of a long pass.
        """
        for run in waiting:
            if run.cancelled:
                return run
        under_way = {self._lane(run) for run in self._runs if run.leads}
        able = [run for run in waiting if run.ready and not (run.at_offer and self._lane(run) in under_way)]
        if (first := self._queue.next_of(able, self._wanting)) is None:
            return None
        lane = self._lane(first)
        fellows = [run for run in able if self._lane(run) == lane]
        if lane in under_way:
            return next((run for run in fellows if run.leads), first)
        return self._begin_pass(fellows)

    def _begin_pass(self, fellows: Sequence[SlicedRun]) -> SlicedRun | None:
        """Begin the pass of the runs whose turns come next, as many as fit; or the first of them that does not stand
        before one, which is to come there first."""
        chosen: list[OfferedMicro] = []
        leader: SlicedRun | None = None
        for run in self._queue.turns(fellows, self._pass_seconds):
            if run.offered is None or not run.at_offer:
                return run
            if leader is None:
                leader = run
            elif not run.joins or sum(one.tokens for one in (*chosen, run.offered)) > self._joint_tokens:
                continue
            chosen.append(run.offered)
            if not leader.joins:
                break
        if chosen:
            chosen[0].begin(chosen[1:])
        return leader

    def _pass_seconds(self, run: SlicedRun) -> float:
        return math.inf if run.offered is None else self._token_seconds * run.offered.tokens

    def _members(self, run: SlicedRun) -> dict[SlicedRun, int]:
        """The runs of the pass that a run computes, with their tokens; empty where it computes none."""
        if (led := run.offered) is None or not led.leads:
            return {}
        offers = {one: one.offered for one in self._runs}
        return {one: offered.tokens for one, offered in offers.items() if offered in (led, *led.beside) and offered}

    def _charge(self, run: SlicedRun, spent: float, members: Mapping[SlicedRun, int]) -> None:
        """Count time that a run used: for its own work, or for a pass, whose members share it by their tokens."""
        total = sum(members.values())
        for one, tokens in members.items() or [(run, 1)]:
            part = spent * tokens / max(1, total)
            self._queue.charge(one, part)
            one.pacer.busy_seconds += part
        run.pacer.busy_seconds -= spent

    def _learn_pass(self, led: OfferedMicro, spent: float) -> None:
        led.seconds += spent
        if led.done:
            found = led.seconds / sum(one.tokens for one in (led, *led.beside))
            known = self._token_seconds or found
            self._token_seconds = known + EMA_WEIGHT * (found - known)

    def _train(
        self, run: SlicedRun, seconds: float, longest: float | None, led: OfferedMicro | None, *, rest: bool
    ) -> float:
        """Work on a run, at most to the end of the pass `led`: what follows is the run's own time, not its members'."""

        def interrupted() -> bool:
            return self._interrupted() or (led is not None and led.done)

        try:
            spent = run.work(seconds, longest=longest, rest=rest, interrupted=interrupted)
        except Exception:
            log.exception("training_failed")
            run.pacer.close()
            message = "An internal error ended this job; the server's log has it."
            self._runs[run](FailedEvent(step=run.step, code="internal_error", message=message))
            return 0.0
        if run.pacer.done:
            threading.Thread(target=give_back_memory, name="trim", daemon=True).start()
        return spent
