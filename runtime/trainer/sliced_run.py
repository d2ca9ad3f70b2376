"""A run of slices: methods that drive it, and methods that control it. A subclass defines the slices.

`pause`, `resume` and `cancel` may be called from any thread; a pause takes effect at the end of a step, from which
the run can continue.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from runtime.events import CancelledEvent, RunEvent
from runtime.model.lora import Adapter, LoraShape
from runtime.model.vocabulary import RowTargets
from runtime.trainer.course import Restored, Snapshot
from runtime.trainer.lora import PartSizes, StartUse, Targets, adapter_of
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.rules import beta_of
from runtime.trainer.riding import Ride
from runtime.trainer.schedule import ExampleFeed, Schedule
from runtime.trainer.slices import Pacer, Slices
from runtime.trainer.step import OfferedMicro

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
        self,
        seconds: float,
        *,
        longest: float | None = None,
        rest: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float:
        """Train for about `seconds`; returns the seconds it took. On the engine thread. `longest`, `rest`: see
        `Pacer.run`. Ends before the next slice where `interrupted` is true."""
        if self._cancel_asked and not self.pacer.done:
            self.pacer.close()
            self._on_event(CancelledEvent(step=self.step))

        def may_go_on() -> bool:
            stands = self.at_offer or self.waits_for_ride or self._cancel_asked
            return self.ready and not stands and not interrupted()

        return self.pacer.run(seconds, may_go_on, longest=longest, rest=rest)

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
