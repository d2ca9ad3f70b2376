"""A run of slices: methods that drive it, and methods that control it. A subclass defines the slices.

`pause`, `resume` and `cancel` may be called from any thread; a pause takes effect at the end of a step, from which
the run can continue.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from runtime.events import CancelledEvent, FailedEvent, RunEvent
from runtime.model.lora import Adapter, LoraShape
from runtime.model.vocabulary import RowTargets
from runtime.support.logs import get_logger
from runtime.support.memory import give_back_memory
from runtime.trainer.course import Restored, Snapshot
from runtime.trainer.lora import PartSizes, StartUse, Targets, adapter_of
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.rules import beta_of
from runtime.trainer.riding import Ride, RowPace
from runtime.trainer.schedule import ExampleFeed, Schedule
from runtime.trainer.slices import EMA_WEIGHT, FairQueue, Pacer, Slices, TrainingShare
from runtime.trainer.step import MOST_TOKENS, OfferedMicro

# -- input -----------------------------------------------------------------------------------------
#
# Input of a training run apart from the model and the data.


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The loss by its name in `runtime.trainer.losses`, and its options."""

    name: str = "supervised"
    options: dict[str, float | str] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> "LossSpec":
        """The loss of a recipe."""
        if recipe.rl is None:
            return cls()
        options = {"beta": beta_of(recipe), **_OPTIONS[recipe.rl](recipe)}
        given: dict[str, float | str] = {name: value for name, value in options.items() if value is not None}
        return cls(name="dpo" if recipe.rl == "ipo" else recipe.rl, options=given)


def _dpo_options(recipe: Recipe) -> dict[str, float | None]:
    terms: tuple[str, ...] = ("ipo",) if recipe.rl == "ipo" else recipe.dpo_loss_type or ("sigmoid",)
    if recipe.dpo_norm_loss:
        terms = ("sigmoid_norm",)
    weights = dict(zip(terms, recipe.dpo_loss_weights or [1.0] * len(terms), strict=True))
    smoothing = {"label_smoothing": recipe.dpo_label_smoothing}
    return {"sigmoid": 0.0, "sft": recipe.rpo_alpha, **smoothing, **weights}


_OPTIONS: dict[str, Callable[[Recipe], dict[str, float | None]]] = {
    "dpo": _dpo_options,
    "ipo": _dpo_options,
    "orpo": lambda recipe: {},
    "kto": lambda recipe: {
        "desirable_weight": recipe.kto_desirable_weight,
        "undesirable_weight": recipe.kto_undesirable_weight,
    },
    "cpo": lambda recipe: {"sft": recipe.cpo_alpha},
    "simpo": lambda recipe: {"sft": recipe.cpo_alpha, "gamma": recipe.simpo_gamma},
}
"""Method → the further options of its loss; None: the loss's own default."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run. Hyper-parameters are read from the recipe itself, which declares them."""

    recipe: Recipe = field(repr=False)
    schedule: Schedule
    """Steps of the optimiser that the recipe comes to with its data."""
    targets: Targets = field(repr=False)
    loss: LossSpec = LossSpec()
    rows: RowTargets = field(default_factory=RowTargets, repr=False)
    """Rows of embedding and head that are trained."""
    sizes: PartSizes = field(default_factory=dict, repr=False)
    """Ranks and scales by the patterns of `shape`."""

    @property
    def shape(self) -> LoraShape:
        """Rank and scale of the adapter in training."""
        return shape_of_recipe(self.recipe)

    @property
    def start(self) -> StartUse:
        """Use of a copy of the first weights."""
        if self.recipe.begins_in_base:
            return "subtracted"
        return "reference" if self.recipe.lora_model_dir is not None else "none"

    def adapter_of(self, captured: Mapping[str, Tensor]) -> Adapter:
        """Parameters that a run captured, as an adapter to serve or to write."""
        subtracted = self.start == "subtracted"
        return adapter_of(captured, self.targets, self.shape, self.rows, self.sizes, subtracted=subtracted)


def shape_of_recipe(recipe: Recipe) -> LoraShape:
    """Ranks and scales of a recipe's adapter."""
    return LoraShape(
        rank=recipe.lora_r,
        alpha=recipe.lora_alpha,
        rslora=recipe.peft_use_rslora,
        rank_pattern=recipe.lora_rank_pattern,
        alpha_pattern=recipe.lora_alpha_pattern,
        dora=recipe.peft_use_dora,
    )


WriteAdapter = Callable[[Path, Adapter], None]
"""Writes an adapter in PEFT's format into a fresh directory, and syncs it."""


class SlicedRun(ABC):
    """`pacer` drives it. Reports through `on_event`, on the thread that drives it.

    Every event that announces a snapshot (a checkpoint, a pause, the end) has one of its own, in the events' order,
    even where two are of the same step.
    """

    def __init__(
        self, on_event: Callable[[RunEvent], None], clock: Callable[[], float], *, whole: bool = False
    ) -> None:
        """`whole`: see `Pacer`."""
        self._on_event = on_event
        self._snapshots: deque[Snapshot] = deque()
        self._waits_for_disk = False
        self._max_untaken: int | None = None
        """None: any number, for a run whose snapshots are not written as they come."""
        self._awaits_answers = False
        self._answers: Mapping[str, float] | None = None
        self._pause_asked = False
        self._cancel_asked = False
        self._paused = False
        self.beside_requests = False
        """True while requests run beside it. Engine thread only, as all that is about riding."""
        self.offers = False
        """True to stand still before each pass until it is begun (`offered`). Engine thread only."""
        self.pacer = Pacer(self._slices(), clock, whole=whole)

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps done."""

    @abstractmethod
    def _slices(self) -> Slices:
        """All of the run, from here to its last event."""

    # -- from any thread -----------------------------------------------------------------------

    def bound_untaken(self, most: int) -> None:
        """Have the run wait before it captures a snapshot while `most` wait to be taken."""
        self._max_untaken = most

    @property
    def ready(self) -> bool:
        """True if there is anything to do now."""
        if self.pacer.done or self._cancel_asked:
            return not self.pacer.done
        if self.offered is not None and self.offered.waits:
            return False
        if self._awaits_answers and self._answers is None and not self._pause_asked:
            return False
        return not (self._paused and self._pause_asked) and not (self._waits_for_disk and self._backlogged)

    @property
    def _backlogged(self) -> bool:
        return self._max_untaken is not None and len(self._snapshots) >= self._max_untaken

    def work(
        self, seconds: float, *, longest: float | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> float:
        """Train for about `seconds`; returns the seconds it took. On the engine thread. `longest`: see `Pacer.run`.
        Ends before the next slice where `interrupted` is true."""
        if self._cancel_asked and not self.pacer.done:
            self.pacer.close()
            self._on_event(CancelledEvent(step=self.step))

        def may_go_on() -> bool:
            stands = self.at_offer or self.waits_for_ride or self._cancel_asked
            return self.ready and not stands and not interrupted()

        return self.pacer.run(seconds, may_go_on, longest=longest)

    def pause(self) -> None:
        """Stand still at the end of this step, with a snapshot."""
        self._pause_asked = True

    def resume(self) -> None:
        self._pause_asked = False

    def cancel(self) -> None:
        """End before the next slice."""
        self._cancel_asked = True

    def answer(self, metrics: Mapping[str, float]) -> None:
        """Give the metrics that a `GenerateEvent` asked for; drive the run again afterwards."""
        self._answers = metrics

    def _given_answers(self) -> Mapping[str, float] | None:
        return self._answers

    def take_snapshot(self, step: int) -> Snapshot:
        """The earliest snapshot of `step` that was not taken yet. Raises `KeyError` for a step
        without. The run may wait for this (`ready`): drive it again afterwards."""
        for place, snapshot in enumerate(self._snapshots):
            if snapshot.progress.step == step:
                del self._snapshots[place]
                return snapshot
        raise KeyError(step)

    # -- passes with other runs: see `runtime.trainer.step` ----------------------------------

    @property
    def offered(self) -> OfferedMicro | None:
        """The micro-batch whose pass is next, or under way."""
        return None

    @property
    def joins(self) -> bool:
        """True if the pass that is next can be one of several runs."""
        return False

    @property
    def at_offer(self) -> bool:
        """True if it stands before a pass."""
        return self.offered is not None and not self.offered.begun

    @property
    def leads(self) -> bool:
        """True while it computes a pass, its own alone or that of other runs too."""
        return self.offered is not None and self.offered.leads

    @property
    def cancelled(self) -> bool:
        """True if it is to end before the next slice."""
        return self._cancel_asked

    # -- riding: see `runtime.trainer.riding` -----------------------------------------------------

    def ride_with(self, widths: tuple[int, int, int, int]) -> None:
        """Let tokens ride, where the run has some that can; `widths`: see `KeptLayers`."""
        return

    def next_ride(self) -> Ride | None:
        """A ride that is under way, or a new one; None where nothing is to ride now."""
        return None

    def stop_riding(self) -> None:
        """Drop what is under way."""
        return

    @property
    def waits_for_ride(self) -> bool:
        """True if there is nothing to do in slices before a ride has ended."""
        return False

    @property
    def forward_seconds(self) -> float | None:
        """Time of a token's forward pass in slices; None while it is unknown."""
        return None


class MakeRun(Protocol):
    """Makes runs on the model that is served, wherever that is. Raises `ValueError` when `restored` is from another
    run."""

    def __call__(
        self,
        spec: RunSpec,
        feed: ExampleFeed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> SlicedRun: ...


# -- host ------------------------------------------------------------------------------------------
#
# The engine thread's side of training: holds the runs at work, and gives each its share of the time.

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
    ) -> None:
        """`on_slices` is called with the seconds of every stretch of training, and the part of the slack that training
        uses. Where `interrupted` is true, no slice begins. Up to `riding_rows` tokens ride in a step, where there are
        `kept_widths` (`KeptLayers`); `on_ride` is called with the number that did."""
        self._share = share
        self._on_slices = on_slices
        self._interrupted = interrupted
        self._runs: dict[SlicedRun, Callable[[RunEvent], None]] = {}
        self._queue: FairQueue[SlicedRun] = FairQueue()
        self._token_seconds = math.inf
        """Time of a token in a pass: smoothed; infinite while it is unknown."""
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
        if (run := self._queue.next_of(riding)) is None:
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
        """Let the run train that is next, or one after it where it has no slice that fits. One that comes to its next
        pass leaves the rest of the time to the pass."""
        waiting = [run for run in self._runs if run.ready]
        total = 0.0
        while total < seconds and (run := self._next(waiting)) is not None:
            led, members = run.offered, self._members(run)
            spent = self._train(run, seconds - total, longest)
            self._charge(run, spent, members)
            if led is not None and members:
                self._learn_pass(led, spent)
            total += spent
            if not run.at_offer:
                if spent:
                    break
                waiting.remove(run)
        if total:
            self._on_slices(total, self._share.slack_used)
        return total

    def _next(self, waiting: Sequence[SlicedRun]) -> SlicedRun | None:
        """The run to work on; one that stands before its pass has begun it then.

        Of runs of one priority a pass that is under way goes first, and others begin none: several at once would keep
        several times as much in memory.
        """
        for run in waiting:
            if run.cancelled:
                return run
        # Those that wait for a pass still want their time: the queue is not asked meanwhile, or they would lose it.
        under_way = {self._queue.priority(run) for run in self._runs if run.leads}
        while (first := next(self._queue.turns(waiting, self._pass_seconds), None)) is not None:
            priority = self._queue.priority(first)
            equals = [run for run in waiting if self._queue.priority(run) == priority]
            if priority not in under_way:
                self._queue.next_of(waiting)
                return self._begin_pass(equals)
            able = [run for run in equals if not run.at_offer]
            if leading := [run for run in able if run.leads]:
                return leading[0]
            if able:
                return next(self._queue.turns(able, self._pass_seconds))
            waiting = [run for run in waiting if run not in equals]
        return None

    def _begin_pass(self, able: Sequence[SlicedRun]) -> SlicedRun | None:
        """Begin the pass of the runs whose turns come next, as many as fit; or the first of them that does not stand
        before one, which is to come there first."""
        chosen: list[OfferedMicro] = []
        leader: SlicedRun | None = None
        for run in self._queue.turns(able, self._pass_seconds):
            if run.offered is None or not run.at_offer:
                return run
            if leader is None:
                leader = run
            elif not run.joins or sum(one.tokens for one in (*chosen, run.offered)) > MOST_TOKENS:
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
            known = found if math.isinf(self._token_seconds) else self._token_seconds
            self._token_seconds = known + EMA_WEIGHT * (found - known)

    def _train(self, run: SlicedRun, seconds: float, longest: float | None) -> float:
        try:
            spent = run.work(seconds, longest=longest, interrupted=self._interrupted)
        except Exception:
            log.exception("training_failed")
            run.pacer.close()
            message = "An internal error ended this job; the server's log has it."
            self._runs[run](FailedEvent(step=run.step, code="internal_error", message=message))
            return 0.0
        if run.pacer.done:
            threading.Thread(target=give_back_memory, name="trim", daemon=True).start()
        return spent
