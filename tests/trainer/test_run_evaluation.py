"""Evaluations of a run: which weights are the best, by which metric, and answers that are generated elsewhere."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.events import CheckpointEvent, EvalEvent, FinishedEvent, GenerateEvent, PausedEvent, RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.trainer.course import Snapshot, read_snapshot
from runtime.trainer.run import TrainingRun
from tests.trainer.tiny_training import examples, load_decoder, make_run, run_spec


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


class Answered:
    """A run whose generated answers have the metrics that the test says, an evaluation each."""

    def __init__(self, decoder: Decoder, metrics: list[Mapping[str, float]], **keys: Any) -> None:
        self.events: list[RunEvent] = []
        self.snapshots: list[Snapshot] = []
        """Those that answers were generated with."""
        self._metrics = list(metrics)
        basic = {"total_steps": 6, "warmup_steps": 0, "eval_every": 2, "save_every": None, "do_causal_lm_eval": True}
        spec = run_spec(decoder, **{**basic, **keys})
        self.run: TrainingRun = make_run(decoder, spec, self.events, test=[examples(2, seed=5)])

    def drive(self) -> "Answered":
        while self.run.ready or self.asked is not None:
            if self.asked is not None:
                self.answer()
            self.run.work(math.inf)
        return self

    @property
    def asked(self) -> GenerateEvent | None:
        last = self.events[-1] if self.events else None
        waits = isinstance(last, GenerateEvent) and len(self.snapshots) < len(self.of(GenerateEvent))
        return last if isinstance(last, GenerateEvent) and waits else None

    def answer(self) -> None:
        assert self.asked is not None
        assert not self.run.ready, "it waits"
        self.snapshots.append(self.run.take_snapshot(self.asked.step))
        self.run.answer(self._metrics.pop(0))

    def of(self, kind: type[RunEvent]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def end(self) -> FinishedEvent:
        assert isinstance(self.events[-1], FinishedEvent)
        return self.events[-1]


def scores(name: str, *values: float) -> list[Mapping[str, float]]:
    return [{name: value} for value in values]


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "values", "keys", "best"),
    [
        ("exact_match", (0.5, 0.75, 0.25), {}, 4),
        ("exact_match", (0.5, 0.5, 0.5), {}, 2),
        ("ter", (60, 70, 50), {}, 6),
        ("mine", (1, 3, 2), {}, 4),
        ("mine", (1, 3, 2), {"greater_is_better": False}, 2),
        ("exact_match", (math.nan, 0.1, 0.2), {}, 6),
        ("exact_match", (0.5, 0.75, 0.25), {"load_best_model_at_end": False}, 6),
    ],
)
def test_the_best_by_a_metric(
    decoder: Decoder, name: str, values: tuple[float, ...], keys: dict[str, Any], best: int
) -> None:
    made = Answered(decoder, scores(name, *values), metric_for_best_model=f"eval_{name}", **keys).drive()
    assert made.end.best_step == best
    evals = made.of(EvalEvent)
    assert [event.step for event in evals] == [2, 4, 6]
    assert [event.metrics[name] for event in evals] == pytest.approx(list(values), nan_ok=True)
    assert [event.metrics["perplexity"] for event in evals] == [pytest.approx(math.exp(event.loss)) for event in evals]
    result = made.run.take_snapshot(6).result
    assert [same(result, one.parameters) for one in made.snapshots] == [step == best for step in (2, 4, 6)]


def test_a_metric_that_is_missing_makes_nothing_the_best(decoder: Decoder) -> None:
    made = Answered(decoder, [{}, {}, {}], metric_for_best_model="exact_match").drive()
    assert made.end.best_step == 6
    assert made.run.take_snapshot(6).best is None


def test_answers_are_those_of_the_current_weights(decoder: Decoder) -> None:
    """Not of the best ones so far, which a checkpoint would publish."""
    made = Answered(decoder, scores("bleu", 3, 2, 1), metric_for_best_model="bleu").drive()
    first, second, third = (one.result for one in made.snapshots)
    assert not same(first, second)
    assert not same(second, third)
    assert not made.snapshots[0].optimizer


def test_early_stopping_by_a_metric(decoder: Decoder) -> None:
    values = scores("exact_match", 0.5, 0.4, 0.5, 0.9)
    made = Answered(
        decoder, values, metric_for_best_model="exact_match", early_stopping_patience=2, total_steps=20
    ).drive()
    assert (made.end.step, made.end.best_step, made.end.reason) == (6, 2, "early_stopping")


def test_the_base_is_measured_before_the_first_step(decoder: Decoder) -> None:
    """And is no candidate for the best."""
    values = scores("exact_match", 0.9, 0.1, 0.2, 0.3)
    made = Answered(decoder, values, metric_for_best_model="exact_match", val_set_size=1.0).drive()
    assert [event.step for event in made.of(EvalEvent)] == [0, 2, 4, 6]
    kinds = [type(event) for event in made.events[:3]]
    assert kinds == [GenerateEvent, EvalEvent, StepEvent]
    assert all(not tensor.any() for name, tensor in made.snapshots[0].parameters.items() if name.endswith(".b"))
    assert made.end.best_step == 6


@pytest.mark.parametrize("eval_every", [2, None])
def test_a_pause_while_answers_are_generated(decoder: Decoder, tmp_path: Path, eval_every: int | None) -> None:
    """The evaluation is done again: in this run, and in one that goes on from the snapshot."""
    keys = {"metric_for_best_model": "exact_match", "eval_every": eval_every}
    undisturbed = Answered(decoder, scores("exact_match", 0.5, 0.7, 0.6), **keys).drive()
    made = Answered(decoder, scores("exact_match", 0.5, 0.7, 0.6), **keys)
    while made.asked is None:
        made.run.work(math.inf)
    step = made.asked.step
    made.snapshots.append(made.run.take_snapshot(step))
    made.run.pause()
    made.run.work(math.inf)
    assert made.events[-1] == PausedEvent(step=step)
    assert not made.of(EvalEvent)
    assert not made.run.ready
    paused = made.run.take_snapshot(step)
    (tmp_path / "paused").mkdir()
    paused.write(tmp_path / "paused")

    made.run.resume()
    made.drive()
    assert made.events[-1] == undisturbed.events[-1]

    again = Answered(decoder, scores("exact_match", 0.5, 0.7, 0.6), **keys)
    spec = again.run._spec
    restored = read_snapshot(tmp_path / "paused")
    again.run = make_run(decoder, spec, again.events, test=[examples(2, seed=5)], restored=restored)
    again.drive()
    assert again.events[-1] == undisturbed.events[-1]
    assert [event.step for event in again.of(EvalEvent)] == [event.step for event in undisturbed.of(EvalEvent)]
    assert same(again.run.take_snapshot(6).result, undisturbed.run.take_snapshot(6).result)


def test_a_cancelled_run_waits_for_no_answer(decoder: Decoder) -> None:
    made = Answered(decoder, [])
    while made.asked is None:
        made.run.work(math.inf)
    made.run.cancel()
    assert made.run.ready
    made.run.work(math.inf)
    assert made.run.pacer.done


def test_a_checkpoint_of_the_last_weights_has_no_best_ones(decoder: Decoder) -> None:
    keys = {"metric_for_best_model": "bleu", "load_best_model_at_end": False, "save_every": 3}
    made = Answered(decoder, scores("bleu", 9, 1, 1), **keys).drive()
    (checkpoint,) = made.of(CheckpointEvent)
    assert made.run.take_snapshot(checkpoint.step).best is None
