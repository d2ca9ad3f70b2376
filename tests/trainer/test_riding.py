"""Tokens of training that ride in steps of requests: nothing changes by it, for the job or for the requests."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.cpu import CpuOps
from runtime.blocks import NO_MATCH
from runtime.engine.service import EngineService
from runtime.events import FailedEvent, FinishedEvent, PausedEvent, RunEvent, StepEvent
from runtime.messages import SamplingParams, Submission
from runtime.model.decoder import Decoder
from runtime.support import failpoints
from runtime.trainer.course import read_snapshot
from runtime.trainer.data.example import Example
from runtime.trainer.host import TrainingHost
from runtime.trainer.riding import MOST_REFUSALS, RowPace, cut
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import LossSpec
from runtime.trainer.slices import LatencyTargets, TrainingShare
from runtime.trainer.step import OfferedMicro
from settings.load import load
from tests.trainer.tiny_training import all_targets, run_spec, write_nothing

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason="tokens ride in the C++ kernels' fused pass")

ROWS = [
    Example([(7 * n + 3 * place) % 500 for place in range(30 + n)], [place > 9 for place in range(30 + n)])
    for n in range(8)
]
"""A micro-batch of 6 is 2 pieces, one of 2 is 1."""
MICRO_BATCHES = [ROWS[:6], ROWS[6:]]
LITTLE = 3e-4
"""Seconds: few slices."""


@pytest.fixture(scope="module")
def service(tiny_model: Path) -> Iterator[EngineService]:
    flags = {"model": str(tiny_model), "deterministic": True, "num_blocks": 32}
    made = EngineService.load(load(flags=flags, env={}).settings)
    yield made
    made.engine.close()


@pytest.fixture
def decoder(service: EngineService) -> Decoder:
    assert isinstance(service.decoder, Decoder)
    return service.decoder


@pytest.fixture(autouse=True)
def _nothing_left(service: EngineService) -> Iterator[None]:
    yield
    failpoints.configure("")
    scheduler = service.engine.scheduler
    for request in scheduler:
        service.engine.abort(request.id)
    scheduler.check_integrity()
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


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


def weights(run: TrainingRun) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in run._lora.capture().values()])


def make(decoder: Decoder, events: list[RunEvent], **keys: Any) -> TrainingRun:
    restored = keys.pop("restored", None)
    spec = run_spec(decoder, save_every=None, **{"total_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, **keys})
    return TrainingRun(decoder, spec, lambda epoch: MICRO_BATCHES, [], events.append, write_nothing, restored=restored)


def finished(run: TrainingRun) -> TrainingRun:
    """The run at its end, with nothing beside it."""
    while run.ready:
        run.work(float("inf"))
    return run


def some_targets(decoder: Decoder) -> Any:
    """Some linears, of all layers but the first."""
    return {key: parts for key, parts in all_targets(decoder).items() if key[1] in ("out", "gate_up") and key[0] > 0}


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (5, {}),
        (64, {"lora_dropout": 0.3}),
        (2, {"lora_dropout": 0.1, "gradient_checkpointing": True}),
        (9, {"loss": LossSpec(name="dpo", options={"beta": 0.1, "sigmoid": 1.0})}),
        (9, {"targets": some_targets, "lora_dropout": 0.2}),
    ],
)
def test_losses_and_weights_are_those_without_riding(
    service: EngineService, decoder: Decoder, rows: int, keys: dict[str, Any]
) -> None:
    changes_nothing(service, decoder, rows, keys)


def test_in_bfloat16_too(tiny_model: Path) -> None:
    flags = {"model": str(tiny_model), "deterministic": True, "num_blocks": 32, "dtype": "bfloat16"}
    service = EngineService.load(load(flags=flags, env={}).settings)
    try:
        assert isinstance(service.decoder, Decoder)
        changes_nothing(service, service.decoder, 9, {"lora_dropout": 0.2})
    finally:
        service.engine.close()


def changes_nothing(service: EngineService, decoder: Decoder, rows: int, keys: dict[str, Any]) -> None:
    keys = {key: value(decoder) if callable(value) else value for key, value in keys.items()}
    alone: list[RunEvent] = []
    straight = finished(make(decoder, alone, **keys))
    events: list[RunEvent] = []
    beside = Beside(service, make(decoder, events, **keys), rows)
    base = {name: parameter.data.clone() for name, parameter in decoder.parameters().items()}
    beside.finish()
    assert isinstance(events[-1], FinishedEvent)
    assert beside.rode >= len(ROWS[0]), "much of the forward passes rode"
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(events)[1] < losses(events)[0]
    assert torch.allclose(weights(beside.run), weights(straight), atol=2e-5)
    assert all(torch.equal(base[name], parameter.data) for name, parameter in decoder.parameters().items())


def test_requests_get_the_same_bits(service: EngineService, decoder: Decoder) -> None:
    """With requests of different lengths, one of which comes and goes meanwhile."""

    def served(rides: bool) -> list[list[int]]:
        beside = Beside(service, make(decoder, [], total_steps=50))
        beside.submit(tokens=60, seed=1)
        beside.submit(tokens=90, prompt=40, seed=2)
        for number in range(90):
            if number == 20:
                beside.submit(tokens=20, seed=3)
            beside.step(LITTLE, rides=rides)
        beside.run.cancel()
        beside.run.work(1.0)
        assert (beside.rode > 0) == rides
        return list(beside.tokens.values())

    assert served(True) == served(False)


def test_a_run_that_goes_on_from_a_pause_ends_the_same(
    service: EngineService, decoder: Decoder, tmp_path: Path
) -> None:
    keys = {"lora_dropout": 0.2, "total_steps": 3}
    alone: list[RunEvent] = []
    straight = finished(make(decoder, alone, **keys))
    events: list[RunEvent] = []
    beside = Beside(service, make(decoder, events, **keys))
    beside.submit()
    beside.ride()
    beside.run.pause()
    beside.finish()
    assert isinstance(events[-1], PausedEvent)
    assert beside.held == 0
    step = beside.run.step
    beside.run.take_snapshot(step).write(tmp_path)
    beside.run.cancel()
    beside.run.work(1.0)
    second: list[RunEvent] = []
    resumed = Beside(service, make(decoder, second, restored=read_snapshot(tmp_path), **keys))
    resumed.finish()
    assert losses(events) + losses(second) == pytest.approx(losses(alone), rel=1e-5)
    assert torch.allclose(weights(resumed.run), weights(straight), atol=2e-5)


# -- rides that end early --------------------------------------------------------------------------


def test_a_cancelled_run_gives_its_blocks_back(service: EngineService, decoder: Decoder) -> None:
    beside = Beside(service, make(decoder, []))
    beside.submit()
    beside.ride()
    beside.run.cancel()
    beside.run.work(1.0)
    assert beside.held == 0


def test_a_run_that_fails_gives_its_blocks_back(service: EngineService, decoder: Decoder) -> None:
    events: list[RunEvent] = []
    run = make(decoder, events)
    host = TrainingHost(TrainingShare(LatencyTargets(), min_share=0.2))
    host.attach(run, events.append)
    beside = Beside(service, run)
    beside.submit()
    beside.ride()
    run._loss = None  # type: ignore[assignment]
    for piece in run._rides._pieces if run._rides is not None else ():
        piece.work._loss = None  # type: ignore[union-attr]
    while run.ready:
        beside.step()
        host._work(1.0)
    assert isinstance(events[-1], FailedEvent)
    assert beside.held == 0


def test_a_request_that_needs_blocks_gets_those_of_a_ride(service: EngineService, decoder: Decoder) -> None:
    alone: list[RunEvent] = []
    finished(make(decoder, alone))
    events: list[RunEvent] = []
    beside = Beside(service, make(decoder, events))
    scheduler = service.engine.scheduler
    beside.submit(prompt=6)
    beside.ride()
    beside.submit(prompt=(scheduler.blocks.num_free + 1) * scheduler.blocks.block_size, tokens=2, seed=1)
    beside.step()
    assert beside.held == 0
    assert len(scheduler.running) == 2
    assert scheduler.num_preemptions == 0
    beside.finish()
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)


def test_a_request_that_grows_gets_the_blocks_of_a_ride(service: EngineService, decoder: Decoder) -> None:
    beside = Beside(service, make(decoder, []))
    scheduler = service.engine.scheduler
    beside.submit(prompt=16, tokens=60)
    beside.ride()
    held = scheduler.blocks.adopt(NO_MATCH, scheduler.blocks.num_free * scheduler.blocks.block_size)
    try:
        while beside.held:
            beside.step()
        assert len(scheduler.running) == 1
        assert scheduler.num_preemptions == 0
    finally:
        scheduler.blocks.free(held)
    beside.run.cancel()
    beside.run.work(1.0)


def test_nothing_rides_without_spare_blocks(service: EngineService, decoder: Decoder) -> None:
    beside = Beside(service, make(decoder, []))
    blocks = service.engine.scheduler.blocks
    beside.submit()
    beside.step()
    held = blocks.adopt(NO_MATCH, (blocks.num_free - 5) * blocks.block_size)
    try:
        for _ in range(10):
            beside.step(LITTLE)
        assert beside.rode == 0
    finally:
        blocks.free(held)
    beside.run.cancel()
    beside.run.work(1.0)


def test_prefill_goes_before_riding_tokens(service: EngineService, decoder: Decoder) -> None:
    beside = Beside(service, make(decoder, []))
    beside.submit()
    beside.ride()
    rode = beside.rode
    beside.submit(prompt=100, seed=1)
    beside.step()
    assert beside.rode == rode
    beside.run.cancel()
    beside.run.work(1.0)


def test_what_cannot_ride_goes_in_slices(service: EngineService, decoder: Decoder) -> None:
    """Its steps fail, so it is given up, and the requests go on."""
    alone: list[RunEvent] = []
    finished(make(decoder, alone))
    events: list[RunEvent] = []
    beside = Beside(service, make(decoder, events))
    beside.submit(tokens=300)
    for _ in range(3):
        beside.step(LITTLE)
    failpoints.configure("riding.tokens=raise")
    beside.finish(1e-3)
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)
    assert len(service.engine.scheduler.running) == 1


def test_a_ride_that_gets_no_steps_is_given_up(service: EngineService, decoder: Decoder) -> None:
    events: list[RunEvent] = []
    host = TrainingHost(
        TrainingShare(LatencyTargets(), min_share=0.2), riding_rows=4, kept_widths=lambda: service.engine.kept_widths
    )
    run = make(decoder, events, total_steps=1)
    host.attach(run, events.append)
    beside = Beside(service, run)
    beside.submit()
    beside.ride()
    ride = run.next_ride()
    assert ride is not None
    while ride.fraction < 0.6:
        beside.step()
    run.work(60.0)  # all other pieces
    assert run.waits_for_ride
    for _ in range(MOST_REFUSALS):
        host.between_steps(0.01, decoding=False, waiting_since=0.0)
    assert not run.waits_for_ride
    host.detach(run)


def test_an_idle_engine_drops_rides(service: EngineService, decoder: Decoder) -> None:
    events: list[RunEvent] = []
    host = TrainingHost(
        TrainingShare(LatencyTargets(), min_share=0.2), riding_rows=4, kept_widths=lambda: service.engine.kept_widths
    )
    run = make(decoder, events)
    host.attach(run, events.append)
    beside = Beside(service, run)
    beside.submit()
    beside.ride()
    host.idle()
    assert beside.held == 0
    while run.ready:
        host.idle()
    assert isinstance(events[-1], FinishedEvent)


def test_two_runs_ride_in_turns(service: EngineService, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowPace, "choose", lambda *_, **__: 8)  # whatever a step costs on this machine
    keys: list[dict[str, Any]] = [{"lora_dropout": 0.1}, {"lora_r": 8, "seed": 3}]
    alone: list[list[RunEvent]] = [[], []]
    for into, own in zip(alone, keys, strict=True):
        finished(make(decoder, into, **own))
    share = TrainingShare(LatencyTargets(tpot=10.0), min_share=0.2)
    rode: list[int] = []
    passes: list[list[OfferedMicro]] = []
    begin = OfferedMicro.begin

    def noted(self: OfferedMicro, beside: Sequence[OfferedMicro] = ()) -> None:
        passes.append([self, *beside])
        assert len(passes[-1]) == 1 or all(one.micro.ride is None for one in passes[-1])
        begin(self, beside)

    monkeypatch.setattr(OfferedMicro, "begin", noted)
    host = TrainingHost(share, riding_rows=8, kept_widths=lambda: service.engine.kept_widths, on_ride=rode.append)
    events: list[list[RunEvent]] = [[], []]
    for into, own in zip(events, keys, strict=True):
        host.attach(make(decoder, into, **own), into.append)
    beside = Beside(service, make(decoder, []))
    engine = service.engine
    while host.ready:
        if not len(engine.scheduler):
            beside.submit(tokens=400)
        engine.step(ahead=False, ride=None if engine.prefilling else host.ride())
        engine.scheduler.check_integrity()
        share._saved, share._reserve = 0.0, 1.0 - 1e-4  # a little time for slices
        host.between_steps(1e-3, decoding=not engine.prefilling, waiting_since=None)
    assert sum(rode) > 0  # how many depends on what slices get done beside them
    assert {len(several) for several in passes} == {1, 2}, "what has ridden goes back alone, the rest together"
    for mine, theirs in zip(events, alone, strict=True):
        assert losses(mine) == pytest.approx(losses(theirs), rel=1e-4)


# -- pieces and rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2])
def test_pieces_hold_whole_groups_and_all_examples(group: int) -> None:
    lengths = [10, 30, 70, 5, 40, 40]
    rows = [Example([1] * length, [True] * length) for length in lengths]
    parts = list(cut(rows, group))
    assert [example for _, part in parts for example in part] == rows
    assert all(len(part) % group == 0 for _, part in parts)
    assert [start for start, _ in parts] == [sum(map(len, rows[: rows.index(part[0])])) for _, part in parts]
    assert all(sum(map(len, part)) >= 64 for _, part in parts[:-1])
    assert len(parts) > 1


def usual(cost: list[tuple[int, float]], *, price: float = 1e-3, slack: float = 6e-3, most: int = 32) -> int:
    """The number of rows that rides most; `cost`: by how much a step is longer with at most each number of rows."""
    pace, chosen = RowPace(most), []
    for _ in range(2000):
        chosen.append(rows := pace.choose(price=price, slack=slack))
        if rows:
            pace.learn(rows, next(seconds for size, seconds in cost if rows <= size))
    return Counter(chosen[-200:]).most_common(1)[0][0]


def test_as_many_rows_ride_as_cost_nothing() -> None:
    assert usual([(8, 0.0), (32, 20e-3)]) == 8


def test_rows_that_cost_more_than_slices_do_not_ride() -> None:
    assert usual([(4, 5e-3), (32, 9e-3)]) == 0
    assert usual([(4, 1e-4), (8, 3e-3), (32, 9e-3)], price=5e-4) == 4


def test_rows_stay_within_the_slack() -> None:
    assert usual([(4, 1e-3), (6, 2e-3), (10, 5e-3), (32, 8e-3)], price=1.0, slack=7e-3) == 10


def test_a_cost_that_was_wrong_is_found_out() -> None:
    pace = RowPace(8)
    pace.learn(pace.choose(price=1e-3, slack=6e-3), 50e-3)
    chosen = []
    for _ in range(1000):
        chosen.append(rows := pace.choose(price=1e-3, slack=6e-3))
        pace.learn(rows, 0.0)
    assert Counter(chosen[-200:]).most_common(1)[0][0] == 8


def test_some_steps_have_no_riding_rows() -> None:
    pace = RowPace(16)
    assert [pace.choose(price=1.0, slack=1.0) for _ in range(64)].count(0) == 8
