"""Tokens a second of training on this machine, for the time that a plan says: as jobs had them, or before the first
job as a trial has them."""

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from runtime.events import RunEvent, StepEvent
from runtime.model.vocabulary import RowTargets
from runtime.support.logs import get_logger
from runtime.trainer.host import TrainingHost
from runtime.trainer.lora import sizes_of
from runtime.trainer.plan.plan import Plan, feed
from runtime.trainer.plan.served_model import by_linear
from runtime.trainer.schedule import grouped, make_schedule
from runtime.trainer.sliced_run import LossSpec, RunSpec, shape_of_recipe

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

SMOOTHING = 0.2
"""Weight of a step's rate in the mean over steps."""

TRIAL_TOKENS = 256
"""Tokens of a trial's step, or those of one example where that is longer."""
TRIAL_STEPS = 2
"""The first allocates memory; the last one's rate counts."""
MAX_TRIAL_SECONDS = 8.0
"""A trial that takes longer, beside requests or other jobs, ends without a rate…"""
TRIAL_PAUSE_SECONDS = 60.0
"""…and the next one begins no sooner."""

log = get_logger(__name__)


def spec_of(service: "EngineService", plan: Plan) -> RunSpec:
    """The run of a plan on the served model."""
    targets = by_linear(plan.targets, service.lora_base.places)
    return RunSpec(
        recipe=plan.recipe,
        schedule=plan.schedule,
        targets=targets,
        loss=LossSpec.of(plan.recipe),
        rows=RowTargets() if plan.vocabulary is None else plan.vocabulary.rows,
        sizes=sizes_of(targets, shape_of_recipe(plan.recipe), service.lora_base),
    )


class TrainingPace:
    """The rate of training when it has the machine to itself. Any thread; a trial blocks its own."""

    def __init__(self, service: "EngineService", host: TrainingHost) -> None:
        self._service = service
        self._host = host
        self._jobs: float | None = None
        """Tokens a second in jobs; None before the first step of one."""
        self._trial: tuple[tuple[object, ...], float] | None = None
        """Kind of the last recipe that was tried, and its tokens a second."""
        self._next_trial = 0.0

    def note(self, event: StepEvent) -> None:
        """Learn from a step of a job."""
        if event.busy_seconds > 0:
            rate = event.tokens / event.busy_seconds
            known = self._jobs or rate
            self._jobs = known + SMOOTHING * (rate - known)

    def timed(self, plan: Plan, *, trial: bool) -> Plan:
        """The plan with its time. `trial`: take some steps of it where no job has said how long they take, between
        requests and at their latency targets, as a job would. Its time stays unknown where that comes to nothing."""
        if self._jobs is not None:
            return replace(plan, estimate=plan.estimate.at(self._jobs, "jobs"))
        if not trial or plan.launch is not None:
            return plan
        rate = self._tried(plan)
        return plan if rate is None else replace(plan, estimate=plan.estimate.at(rate, "trial"))

    def _tried(self, plan: Plan) -> float | None:
        short = trial_of(plan)
        recipe = short.recipe
        kind = (recipe.rl, recipe.gradient_checkpointing, recipe.lora_r, len(short.targets), len(short.train))
        if self._trial is not None and self._trial[0] == kind:
            return self._trial[1]
        if time.monotonic() < self._next_trial:
            return None
        try:
            rate = self._measured(short)
        except Exception:  # the dry run says the rest of the plan all the same
            log.exception("training_trial_failed")
            rate = None
        if rate is None:
            self._next_trial = time.monotonic() + TRIAL_PAUSE_SECONDS
        else:
            self._trial = (kind, rate)
        return rate

    def _measured(self, short: Plan) -> float | None:
        """Tokens a second of the last step; None where no step ended in time."""
        steps: list[StepEvent] = []
        ended = threading.Event()

        def note(event: RunEvent) -> None:
            if isinstance(event, StepEvent):
                steps.append(event)
            if not isinstance(event, StepEvent) or len(steps) == TRIAL_STEPS:
                ended.set()

        run = self._service.make_run(spec_of(self._service, short), feed(short), note, _write_nothing, None)
        self._service.on_engine_thread(lambda: self._host.attach(run, note))
        ended.wait(MAX_TRIAL_SECONDS)
        self._service.on_engine_thread(lambda: self._host.detach(run))
        taken = [step for step in steps if step.busy_seconds > 0]
        return taken[-1].tokens / taken[-1].busy_seconds if taken else None


def trial_of(plan: Plan) -> Plan:
    """The plan of some steps over a few of its examples, of the middle length, with nothing besides."""
    size = plan.recipe.group_size
    groups = [plan.train[first : first + size] for first in range(0, len(plan.train), size)]
    groups.sort(key=lambda group: sum(map(len, group)))
    middle = len(groups) // 2
    few = groups[middle : middle + 1]
    for group in groups[middle + 1 : middle + plan.recipe.micro_batch_size]:
        if sum(len(example) for one in [*few, group] for example in one) > TRIAL_TOKENS:
            break
        few.append(group)
    train = [example for group in few for example in group]
    recipe = msgspec.structs.replace(
        plan.recipe,
        micro_batch_size=len(few),
        gradient_accumulation_steps=1,
        max_steps=TRIAL_STEPS + 1,  # it is dropped before its end, and so writes nothing
        warmup_steps=None,
        save_strategy="no",
        eval_strategy="no",
    )
    bins = grouped([len(example) for example in train], size, None)
    schedule = make_schedule(recipe, 1, evaluates=False)
    return replace(plan, recipe=recipe, train=train, test=[], generation=[], bins=bins, schedule=schedule)


def _write_nothing(directory: object, adapter: object) -> None:
    raise AssertionError("a trial ends before it has an adapter")
