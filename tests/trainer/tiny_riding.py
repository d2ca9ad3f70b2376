"""Steps of requests with a run beside them, whose tokens ride."""

from dataclasses import dataclass, field
from typing import Any

from runtime.engine.service import EngineService
from runtime.events import RunEvent, StepEvent
from runtime.messages import SamplingParams, Submission
from runtime.model.decoder import Decoder
from runtime.trainer.data.example import Example
from runtime.trainer.run import TrainingRun
from tests.trainer.tiny_training import run_spec, write_nothing

ROWS = [
    Example([(7 * n + 3 * place) % 500 for place in range(30 + n)], [place > 9 for place in range(30 + n)])
    for n in range(8)
]
"""A micro-batch of 6 is 2 pieces, one of 2 is 1."""
MICRO_BATCHES = [ROWS[:6], ROWS[6:]]
LITTLE = 3e-4
"""Seconds: few slices."""


@dataclass
class Beside:
    """Steps of requests with a run beside them, in this thread."""

    service: EngineService
    run: TrainingRun
    rows: int = 5
    rode: int = 0
    """Tokens that were computed in steps of requests."""
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Tokens of each request."""

    def __post_init__(self) -> None:
        widths = self.service.engine.kept_widths
        assert widths is not None
        self.run.ride_with(widths)
        self.run.beside_requests = True

    def submit(self, *, tokens: int = 400, prompt: int = 6, seed: int = 0) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed)
        ids = [3 + seed + place for place in range(prompt)]
        self.service.engine.submit(Submission(request_id=f"seed-{seed}", prompt_ids=ids, params=params))

    def step(self, slices: float = 0.0, *, rides: bool = True) -> None:
        """A step of requests, and then some training."""
        engine = self.service.engine
        ride = self.run.next_ride() if rides and not engine.prefilling else None
        before = 0 if ride is None else ride.num_done
        for output in engine.step(ahead=False, ride=None if ride is None else (ride, self.rows)):
            self.tokens.setdefault(output.id, []).extend(output.token_ids)
        if ride is not None:
            self.rode += ride.num_done - before
        engine.scheduler.check_integrity()
        if slices:
            self.run.work(slices, longest=slices)

    def ride(self) -> None:
        """Step until some tokens ride, and some of their sequence do not yet."""
        for _ in range(100):
            self.step(LITTLE)
            if self.held:
                return
        raise AssertionError("nothing rides")

    @property
    def held(self) -> int:
        """Blocks of riding sequences."""
        return self.service.engine.scheduler.riding.num_held

    def finish(self, slices: float = 2e-4) -> None:
        """Train to the end, with a request beside it at all times."""
        while self.run.ready:
            if not len(self.service.engine.scheduler):
                self.submit()
            self.step(slices)


def losses(events: list[RunEvent]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepEvent)]


def make(decoder: Decoder, events: list[RunEvent], **keys: Any) -> TrainingRun:
    restored = keys.pop("restored", None)
    spec = run_spec(decoder, save_every=None, **{"total_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, **keys})
    return TrainingRun(decoder, spec, lambda epoch: MICRO_BATCHES, [], events.append, write_nothing, restored=restored)


def finished(run: TrainingRun) -> TrainingRun:
    """The run at its end, with nothing beside it."""
    while run.ready:
        run.work(float("inf"))
    return run
