"""A run from its first to its last step: resuming, pausing, ending early, and what it reports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.events import (
    CancelledEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    RunEvent,
    StepEvent,
)
from runtime.model.decoder import Decoder
from runtime.support import failpoints
from runtime.trainer.course import ADAPTER, read_snapshot
from runtime.trainer.run import TrainingRun
from tests.trainer.tiny_training import batches_of, drive, examples, load_decoder, make_run, run_spec, write_nothing


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


def steps(events: list[RunEvent]) -> list[StepEvent]:
    return [event for event in events if isinstance(event, StepEvent)]


def weights(run: TrainingRun) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in run._lora.capture().values()])


def test_it_learns_and_reports_every_step(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    spec = run_spec(decoder, total_steps=30, warmup_steps=0, save_every=None)
    run = make_run(decoder, spec, events, data=examples(4))
    drive(run)
    assert [event.step for event in steps(events)] == list(range(1, 31))
    assert steps(events)[-1].loss < 0.5 * steps(events)[0].loss
    assert steps(events)[-1].epoch == 30  # 4 examples, 2 a micro-batch, 2 of those a step
    assert steps(events)[0].learning_rate == pytest.approx(5e-3)
    assert isinstance(events[-1], FinishedEvent)
    assert events[-1].step == events[-1].best_step == 30
    assert not run.ready


def test_the_base_is_never_changed(decoder: Decoder) -> None:
    before = {name: parameter.data.clone() for name, parameter in decoder.parameters().items()}
    drive(make_run(decoder, run_spec(decoder), []))
    for name, parameter in decoder.parameters().items():
        assert torch.equal(before[name], parameter.data), name
        assert not parameter.data.requires_grad


def test_the_last_group_of_an_epoch_may_be_smaller(decoder: Decoder) -> None:
    """10 examples in micro-batches of 2, 2 of them a step: 2, 2 and 1 micro-batches an epoch."""
    events: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder), events))
    assert [round(event.epoch, 3) for event in steps(events)] == [0.333, 0.667, 1.0, 1.333, 1.667, 2.0]
    assert sum(event.tokens for event in steps(events)) == 2 * sum(map(len, examples(10)))


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_that_goes_on_from_a_snapshot_ends_the_same(decoder: Decoder, stop_at: int, tmp_path: Path) -> None:
    spec = run_spec(decoder, lora_dropout=0.1, eval_every=2)
    test = [examples(2, seed=9)]
    whole: list[RunEvent] = []
    straight = make_run(decoder, spec, whole, test=test)
    drive(straight)
    first: list[RunEvent] = []
    run = make_run(decoder, spec, first, test=test)
    while not any(isinstance(event, CheckpointEvent) and event.step == stop_at for event in first):
        run.work(0.05)
    directory = tmp_path / "snapshot"
    directory.mkdir()
    run.take_snapshot(stop_at).write(directory)
    assert (directory / ADAPTER).is_dir()
    second: list[RunEvent] = []
    resumed = make_run(decoder, spec, second, test=test, restored=read_snapshot(directory))
    drive(resumed)
    assert [event.step for event in steps(second)] == list(range(stop_at + 1, 7))
    for ours, theirs in zip(steps(second), steps(whole)[stop_at:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    torch.testing.assert_close(weights(resumed), weights(straight), atol=1e-5, rtol=1e-4)
    assert second[-1] == whole[-1]


def test_a_snapshot_does_not_change_when_training_goes_on(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    while not any(isinstance(event, CheckpointEvent) for event in events):
        run.work(0.05)
    snapshot = run.take_snapshot(2)
    before = {name: tensor.clone() for name, tensor in (snapshot.parameters | snapshot.optimizer).items()}
    drive(run)
    assert snapshot.progress.step == 2
    for name, tensor in (snapshot.parameters | snapshot.optimizer).items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(KeyError):
        run.take_snapshot(2)


def test_a_snapshot_of_another_adapter_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    drive(run)
    run.take_snapshot(6).write(tmp_path)
    restored = read_snapshot(tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        make_run(decoder, run_spec(decoder, lora_r=8), [], restored=restored)


@pytest.mark.parametrize("damage", ["state.json", "parameters.safetensors", "best.safetensors"])
def test_half_a_snapshot_is_refused(decoder: Decoder, damage: str, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    drive(run)
    run.take_snapshot(6).write(tmp_path)
    content = (tmp_path / damage).read_bytes()
    (tmp_path / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read_snapshot(tmp_path)


def test_pausing_stands_still_with_a_snapshot_and_goes_on(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder, save_every=None), events)
    run.pause()
    drive(run)
    assert isinstance(events[-1], PausedEvent)
    assert events[-1].step == 1
    assert run.take_snapshot(1).progress.step == 1
    assert run.work(1.0) == 0.0
    run.resume()
    drive(run)
    assert isinstance(events[-1], FinishedEvent)
    whole: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder, save_every=None), whole))
    assert [event.loss for event in steps(events)] == pytest.approx([event.loss for event in steps(whole)], abs=1e-6)


@pytest.mark.parametrize("paused", [False, True])
def test_cancelling_ends_at_once(decoder: Decoder, paused: bool) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    if paused:
        run.pause()
        drive(run)
    else:
        run.work(0.05)
    run.cancel()
    assert run.ready
    run.work(1.0)
    assert isinstance(events[-1], CancelledEvent)
    assert not run.ready
    assert events.count(events[-1]) == 1


def test_the_best_weights_are_the_result(decoder: Decoder) -> None:
    """At a rate that ruins everything the first evaluation is the best one."""
    events: list[RunEvent] = []
    spec = run_spec(
        decoder,
        learning_rate=0.05,
        max_grad_norm=0,
        lr_scheduler="constant",
        total_steps=6,
        warmup_steps=0,
        loss_watchdog_threshold=1e9,
        eval_every=1,
        save_every=None,
    )
    data = examples(4)
    run = make_run(decoder, spec, events, data=data, test=[examples(4, seed=5)])
    drive(run)
    evals = [event for event in events if isinstance(event, EvalEvent)]
    assert [event.step for event in evals] == [1, 2, 3, 4, 5, 6]
    best = min(evals, key=lambda event: event.loss)
    assert best.step < 6, "the test needs a run that gets worse"
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert finished.best_step == best.step
    snapshot = run.take_snapshot(6)
    assert snapshot.best is not None
    assert any(not torch.equal(snapshot.result[name], snapshot.parameters[name]) for name in snapshot.parameters)


def test_early_stopping(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    spec = run_spec(
        decoder,
        learning_rate=0.05,
        max_grad_norm=0,
        lr_scheduler="constant",
        total_steps=50,
        warmup_steps=0,
        loss_watchdog_threshold=1e9,
        eval_every=1,
        early_stopping_patience=2,
    )
    drive(make_run(decoder, spec, events, test=[examples(4, seed=5)]))
    assert isinstance(events[-1], FinishedEvent)
    assert events[-1].reason == "early_stopping"
    assert events[-1].step < 50


@settings(max_examples=25)
@given(
    total=st.integers(1, 9),
    save_every=st.none() | st.integers(1, 4),
    eval_every=st.none() | st.integers(1, 4),
    patience=st.none() | st.integers(1, 3),
    worse_from=st.integers(0, 9),
    pause_at=st.none() | st.integers(1, 9),
)
def test_every_event_has_a_snapshot_of_its_own(
    decoder: Decoder,
    total: int,
    save_every: int | None,
    eval_every: int | None,
    patience: int | None,
    worse_from: int,
    pause_at: int | None,
) -> None:
    """Checkpoints, evaluations, early stopping, pauses and the end at whatever steps, written at once or later."""
    events: list[RunEvent] = []
    spec = run_spec(
        decoder,
        total_steps=total,
        warmup_steps=0,
        save_every=save_every,
        eval_every=eval_every,
        early_stopping_patience=patience,
    )
    run = make_run(decoder, spec, events, data=examples(2, longest=6), test=[examples(1, longest=6)])
    evaluate = run._evaluate

    def worse_and_worse():  # type: ignore[no-untyped-def]
        if run.step >= worse_from and run._progress.best_value is not None:
            run._progress.best_value = -1.0
        return (yield from evaluate())

    run._evaluate = worse_and_worse  # type: ignore[method-assign]
    seen = 0
    while run.ready:
        if pause_at is not None and run.step >= pause_at - 1:
            run.pause()
            pause_at = None
        run.work(float("inf"))
        if isinstance(events[-1], PausedEvent):
            run.resume()
    told = [event for event in events if isinstance(event, CheckpointEvent | PausedEvent | FinishedEvent)]
    for event in told:
        snapshot = run.take_snapshot(event.step)
        assert snapshot.progress.step == event.step
        # Only from the end nothing goes on.
        assert bool(snapshot.optimizer) is not isinstance(event, FinishedEvent)
        seen += 1
    assert seen == len(told)
    assert not run._snapshots
    finished = told[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.reason == "done") == (finished.step == total)
    due = [step for step in range(1, finished.step) if save_every and step % save_every == 0]
    assert [event.step for event in told if isinstance(event, CheckpointEvent)] == due


def test_a_run_waits_for_a_slow_disk(decoder: Decoder) -> None:
    """One snapshot is being written, one waits: the next is captured when that one is taken, and not before."""
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder, save_every=1), events)
    run.bound_untaken(1)
    drive(run)
    assert [event.step for event in events if isinstance(event, CheckpointEvent)] == [1]
    assert run.step == 2
    for step in range(1, 6):
        assert run.take_snapshot(step).progress.step == step
        assert run.ready
        drive(run)
        assert len(run._snapshots) == 1
    assert isinstance(events[-1], FinishedEvent)
    assert [event.loss for event in steps(events)] == [event.loss for event in steps(_all_at_once(decoder))]


def test_a_run_that_waits_for_the_disk_can_be_cancelled(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder, save_every=1), events)
    run.bound_untaken(1)
    drive(run)
    run.cancel()
    drive(run)
    assert isinstance(events[-1], CancelledEvent)


def _all_at_once(decoder: Decoder) -> list[RunEvent]:
    events: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder, save_every=1), events))
    return events


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_run_that_goes_on_from_a_snapshot_is_the_same_bit_by_bit(
    decoder: Decoder, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is no parameter: the count of steps above the watchdog's threshold, and that memory ran out before."""
    from runtime.trainer import run as module

    short = module.collate

    def collate(batch, device):  # type: ignore[no-untyped-def]
        if len(batch) > 1:
            raise MemoryError
        return short(batch, device)

    spec = run_spec(decoder, lora_dropout=0.1, save_every=1, loss_watchdog_threshold=1.0, loss_watchdog_patience=99)
    data = examples(10, longest=20)
    whole: list[RunEvent] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "collate", collate)
        straight = make_run(decoder, spec, whole, data=data)
        drive(straight)
    straight.take_snapshot(stop_at).write(tmp_path)
    second: list[RunEvent] = []
    resumed = make_run(decoder, spec, second, data=data, restored=read_snapshot(tmp_path))
    drive(resumed)
    assert [event.loss for event in steps(second)] == [event.loss for event in steps(whole)[stop_at:]]
    assert [event.grad_norm for event in steps(second)] == [event.grad_norm for event in steps(whole)[stop_at:]]
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed._watchdog.above == straight._watchdog.above == 6


def test_a_run_of_large_batches_is_the_same_bit_by_bit_too(decoder: Decoder, tmp_path: Path) -> None:
    """Larger than the least that is cut off: what the pacer knew decides where, and goes with the snapshot."""
    data = examples(8, longest=150)

    def run_of(events: list[RunEvent], *, whole: bool = False, **more: Any) -> TrainingRun:
        spec = run_spec(decoder, save_every=1, gradient_accumulation_steps=1)
        return TrainingRun(decoder, spec, batches_of(data, 4), [], events.append, write_nothing, whole=whole, **more)

    whole_events: list[RunEvent] = []
    straight = run_of(whole_events)
    drive(straight)
    straight.take_snapshot(3).write(tmp_path)
    again: list[RunEvent] = []
    resumed = run_of(again, restored=read_snapshot(tmp_path))
    drive(resumed)
    assert [event.loss for event in steps(again)] == [event.loss for event in steps(whole_events)[3:]]
    assert torch.equal(weights(resumed), weights(straight))


def test_a_run_that_is_not_cut_does_not_depend_on_the_time_it_gets(decoder: Decoder) -> None:
    """As with model.deterministic: whatever else the machine does."""
    data = examples(8, longest=150)
    found = []
    for seconds in (float("inf"), 0.01, 1e-4):
        spec = run_spec(decoder, gradient_accumulation_steps=1)
        run = TrainingRun(decoder, spec, batches_of(data, 4), [], lambda event: None, write_nothing, whole=True)
        drive(run, seconds)
        found.append(weights(run))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_loss_that_is_no_number_fails_the_run(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    with torch.no_grad():
        next(iter(run._lora.linears.values())).b[0][0, 0] = float("nan")
    drive(run)
    assert isinstance(events[-1], FailedEvent)
    assert events[-1].code == "nan_loss"
    assert not any(isinstance(event, FinishedEvent) for event in events)


def test_a_gradient_that_is_no_number_fails_the_run_and_changes_nothing(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder), events)
    before = weights(run)
    monkeypatch.setattr(run._optimizer, "_norm", lambda: float("inf"))
    drive(run)
    assert isinstance(events[-1], FailedEvent)
    assert events[-1].code == "nan_loss"
    assert torch.equal(weights(run), before)


def test_a_run_that_diverges_fails(decoder: Decoder) -> None:
    events: list[RunEvent] = []
    spec = run_spec(decoder, loss_watchdog_threshold=0.001, loss_watchdog_patience=2)
    drive(make_run(decoder, spec, events))
    assert isinstance(events[-1], FailedEvent)
    assert (events[-1].code, len(steps(events))) == ("diverged", 1)


def test_out_of_memory_halves_the_micro_batches_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: the first try of a step fails, the step is done in halves, and the losses are what they were."""
    from runtime.trainer import run as module

    sizes: list[int] = []
    whole = module.collate

    def collate(batch, device):  # type: ignore[no-untyped-def]
        sizes.append(len(batch))
        if len(batch) > 1:
            raise MemoryError
        return whole(batch, device)

    expected: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder), expected))
    monkeypatch.setattr(module, "collate", collate)
    events: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder), events))
    assert sizes[0] == 2
    assert set(sizes[1:]) == {1}
    assert [event.loss for event in steps(events)] == pytest.approx([event.loss for event in steps(expected)], abs=1e-4)


def test_out_of_memory_again_fails(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.trainer import run as module

    def collate(batch, device):  # type: ignore[no-untyped-def]
        raise MemoryError

    monkeypatch.setattr(module, "collate", collate)
    events: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder), events))
    assert isinstance(events[-1], FailedEvent)
    assert events[-1].code == "out_of_memory"


def test_what_is_not_foreseen_is_raised_to_the_host(decoder: Decoder) -> None:
    failpoints.configure("train.step=raise:2")
    try:
        with pytest.raises(failpoints.FailpointError):
            drive(make_run(decoder, run_spec(decoder), []))
    finally:
        failpoints.configure("")
