"""A run that waits for its tokens to ride: while they do it computes no forward pass, and it never waits in vain."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernels.cpu import CpuOps
from runtime.engine.service import EngineService
from runtime.events import CancelledEvent, FinishedEvent, PausedEvent, RunEvent
from runtime.messages import BeamSearch, SamplingParams, Submission
from runtime.model.decoder import Decoder
from runtime.trainer.riding import MOST_REFUSALS, RowPace
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import TrainingHost
from runtime.trainer.slices import LatencyTargets, TrainingShare
from settings.load import load
from tests.engine import services
from tests.trainer.tiny_riding import ROWS, Beside, finished, losses, make

SOME_TIME = 0.1
"""Seconds."""

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason="tokens ride in the C++ kernels' fused pass")


@pytest.fixture(scope="module")
def service(tiny_model: Path) -> Iterator[EngineService]:
    made = EngineService.load(load(flags={"model": str(tiny_model), "num_blocks": 64}, env={}).settings)
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[EngineService]:
    """A service with speculation."""
    flags = {"model": str(tiny_model), "num_blocks": 64, "speculative_tokens": 4, "speculative_min_acceptance": 0.0}
    made = EngineService.load(load(flags=flags, env={}).settings)
    yield made
    made.engine.close()


def decoder_of(service: EngineService) -> Decoder:
    assert isinstance(service.decoder, Decoder)
    return service.decoder


@pytest.fixture
def decoder(service: EngineService) -> Decoder:
    return decoder_of(service)


@pytest.fixture(autouse=True)
def _nothing_left(service: EngineService, drafting: EngineService) -> Iterator[None]:
    yield
    for one in (service, drafting):
        abort_all(one)
        one.engine.scheduler.check_integrity()
        assert one.engine.scheduler.blocks.num_free == one.engine.scheduler.blocks.num_blocks


def abort_all(service: EngineService) -> None:
    for request in list(service.engine.scheduler):
        service.engine.abort(request.id)


class Hosted(Beside):
    """As `Beside`, with a host that chooses, in the order of `EngineService`'s steps."""

    def __post_init__(self) -> None:
        self.events: list[RunEvent] = []
        self.host = host_of(self.service)
        self.host.attach(self.run, self.events.append)

    def turn(self) -> None:
        engine = self.service.engine
        if not engine.busy:
            self.host.idle()
            return
        prefilling = engine.prefilling
        engine.step(ahead=False, ride=None if prefilling else self.host.ride())
        engine.scheduler.check_integrity()
        if engine.busy:
            since = engine.waiting_since if prefilling else None
            self.host.between_steps(2e-3, decoding=not prefilling, waiting_since=since)

    def train(self) -> None:
        """Slices, as many as the run has for a while; none where it waits."""
        self.run.work(SOME_TIME, longest=SOME_TIME)

    def wait(self, run: TrainingRun | None = None) -> None:
        """Turns until the run waits for a ride, some of which is computed."""
        for _ in range(1000):
            ride = (run or self.run).awaited_ride
            if ride is not None and ride.num_done:
                return
            if not len(self.service.engine.scheduler):
                self.submit()
            self.turn()
        raise AssertionError("it waits for nothing")


def host_of(service: EngineService) -> TrainingHost:
    """A host that has some time for slices at all times, also while prompts wait."""
    share = TrainingShare(LatencyTargets(tpot=4e-3, ttft=0.0), min_share=0.2)
    return TrainingHost(share, riding_rows=8, kept_widths=lambda: service.engine.kept_widths)


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step costs on this machine."""
    monkeypatch.setattr(RowPace, "choose", lambda *_, **__: 4)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_waits_for_rides(service: EngineService, decoder: Decoder, accumulated: int) -> None:
    """While steps take riding tokens, no forward pass is computed in slices, however much time there is for them; that
    of a step of one piece neither."""
    keys = {"gradient_accumulation_steps": accumulated, "total_steps": 2 // accumulated}
    alone: list[RunEvent] = []
    finished(make(decoder, alone, **keys))
    events: list[RunEvent] = []
    beside = Beside(service, make(decoder, events, **keys))
    beside.finish(1.0)
    assert beside.rode == sum(map(len, ROWS))
    assert "expand_kept" not in beside.run.pacer.rates
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)


def test_a_piece_that_has_ridden_is_not_held_up_by_the_next(service: EngineService, decoder: Decoder) -> None:
    hosted = Hosted(service, make(decoder, []))
    hosted.wait()
    first = hosted.run.awaited_ride
    assert first is not None
    while not first.complete:
        hosted.step()
    following = hosted.run.next_ride()
    assert following is not None
    assert following is not first
    assert hosted.run.awaited_ride is None
    hosted.host.detach(hosted.run)


# -- no more rows ----------------------------------------------------------------------------------


def requests_end(service: EngineService, turn: int) -> None:
    abort_all(service)


def only_prompts(service: EngineService, turn: int) -> None:
    if turn == 0:
        abort_all(service)
    params = SamplingParams(max_tokens=2, ignore_eos=True)  # the next one comes before it ends
    service.engine.submit(Submission(request_id=f"prompt-{turn}", prompt_ids=[3 + turn % 100, 4, 5], params=params))


def only_beams(service: EngineService, turn: int) -> None:
    if turn == 0:
        abort_all(service)
    if not len(service.engine.scheduler):
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        beams = BeamSearch(width=3, best=1)
        service.engine.submit(Submission(request_id=f"b-{turn}", prompt_ids=[3, 4, 5], params=params, beams=beams))


@pytest.mark.parametrize("change", [requests_end, only_prompts, only_beams])
def test_a_run_goes_on_without_rows(
    service: EngineService, decoder: Decoder, change: Callable[[EngineService, int], None]
) -> None:
    alone: list[RunEvent] = []
    finished(make(decoder, alone))
    events: list[RunEvent] = []
    hosted = Hosted(service, make(decoder, events))
    hosted.wait()
    turns = 0
    while hosted.run.awaited_ride is not None:
        change(service, turns)
        hosted.turn()
        turns += 1
        assert turns <= MOST_REFUSALS + 1
    while hosted.run.ready:
        change(service, turns)
        hosted.turn()
        hosted.train()
        turns += 1
        assert turns < 5000
    assert isinstance(events[-1], FinishedEvent)
    assert hosted.held == 0
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)


def test_a_run_ends_beside_steps_with_drafts(drafting: EngineService) -> None:
    """Whether its tokens ride in them or not."""
    decoder = decoder_of(drafting)
    alone: list[RunEvent] = []
    finished(make(decoder, alone))
    events: list[RunEvent] = []
    hosted = Hosted(drafting, make(decoder, events))
    engine, turns = drafting.engine, 0
    while hosted.run.ready:
        if not len(engine.scheduler):
            params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
            engine.submit(Submission(request_id=f"d-{turns}", prompt_ids=[5, 6, 7, 8] * 5, params=params))
        hosted.turn()
        hosted.train()
        turns += 1
        assert turns < 5000
    assert isinstance(events[-1], FinishedEvent)
    assert engine.scheduler.counts.drafts > 0
    assert losses(events) == pytest.approx(losses(alone), rel=1e-5)


def test_a_run_that_waits_is_cancelled_at_once(service: EngineService, decoder: Decoder) -> None:
    events: list[RunEvent] = []
    hosted = Hosted(service, make(decoder, events))
    hosted.wait()
    hosted.run.cancel()
    for _ in range(100):  # it may have used up its share of some gaps
        hosted.turn()
    assert isinstance(events[-1], CancelledEvent)
    assert hosted.held == 0


@pytest.mark.parametrize("requests", [True, False])
def test_a_run_that_waits_comes_to_its_pause(service: EngineService, decoder: Decoder, requests: bool) -> None:
    events: list[RunEvent] = []
    hosted = Hosted(service, make(decoder, events))
    hosted.wait()
    hosted.run.pause()
    for _ in range(5000):
        if not hosted.run.ready:
            break
        if not requests:
            abort_all(service)
        elif not len(service.engine.scheduler):
            hosted.submit()
        hosted.turn()
        hosted.train()
    assert isinstance(events[-1], PausedEvent)
    assert hosted.held == 0
    hosted.host.detach(hosted.run)


def test_a_run_goes_on_while_another_has_all_rows(service: EngineService, decoder: Decoder) -> None:
    hosted = Hosted(service, make(decoder, []))
    hosted.wait()
    first = make(decoder, [])
    hosted.host.attach(first, hosted.events.append, priority=1)
    hosted.wait(first)
    turns = 0
    while hosted.run.awaited_ride is not None:
        hosted.turn()
        turns += 1
        assert turns <= MOST_REFUSALS
    for run in (hosted.run, first):
        hosted.host.detach(run)


# -- with the engine's thread ----------------------------------------------------------------------


async def until(done: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if done():
            return
        await asyncio.sleep(1e-3)
    raise AssertionError("it waits in vain")


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_requests_that_end_or_a_server_that_stops_leave_no_run_waiting(tiny_model: Path, end: str) -> None:
    events: list[RunEvent] = []
    made: list[TrainingRun] = []

    async def body(service: EngineService) -> None:
        host = host_of(service)
        service.background = host
        made.append(run := make(decoder_of(service), events))
        stream = service.submit(services.submission("r"))
        await service.call(lambda: host.attach(run, events.append))
        await until(lambda: run.awaited_ride is not None)
        if end == "abort":
            service.abort(stream.id)
            await until(lambda: not run.ready)
            assert isinstance(events[-1], FinishedEvent)

    services.check_empty(services.run(tiny_model, body))
    made[0].pacer.close()
