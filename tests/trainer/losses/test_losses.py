"""Losses by name, and runs with one that was added by name alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtime.events import EvalEvent, FinishedEvent, RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.trainer import run as run_module
from runtime.trainer import step as step_module
from runtime.trainer.course import Restored, read_snapshot
from runtime.trainer.data.example import Example, collate
from runtime.trainer.losses import LOSSES, Loss, LossInputs, LossValue, Supervised, make_loss
from runtime.trainer.run import TrainingRun, halve
from runtime.trainer.schedule import ExampleFeed
from runtime.trainer.sliced_run import LossSpec, RunSpec
from tests.trainer.losses.samples import PAGE, OddsRatio, documented_dpo
from tests.trainer.tiny_training import drive, examples, load_decoder, run_spec, write_nothing


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


def inputs(logprobs: list[float], trained: Sequence[int], weights: Sequence[float] | None = None) -> LossInputs:
    return LossInputs(
        torch.tensor(logprobs, requires_grad=True),
        None,
        trained,
        torch.tensor(weights or [1.0] * len(trained)),
    )


def test_supervised_is_the_negative_sum_of_weighted_log_probabilities() -> None:
    loss = Supervised()
    found = inputs([-1.0, -2.0, -4.0], [1, 0, 2], [0.5, 9.0, 2.0])
    value = loss(found)
    assert value.total.item() == 0.5 + 2 * (2 + 4)
    assert loss.units(found.trained) == 3
    value.total.backward()  # type: ignore[no-untyped-call]
    batch = collate(
        [
            Example([1, 2], [False, True], weight=0.5),
            Example([1], [False], weight=9.0),
            Example([1, 2, 3], [False, True, True], weight=2.0),
        ],
        torch.device("cpu"),
    )
    assert found.logprobs.grad is not None
    assert loss.slopes(batch).tolist() == found.logprobs.grad.tolist() == [-0.5, -2.0, -2.0]


def test_sums_and_means_over_sequences() -> None:
    found = inputs([1.0, 2.0, 4.0, 8.0], [2, 0, 1, 1])
    assert found.sums(found.logprobs).tolist() == [3.0, 0.0, 4.0, 8.0]
    assert found.means(found.logprobs).tolist() == [1.5, 0.0, 4.0, 8.0]


def test_a_loss_is_made_by_its_name_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "odds", OddsRatio)
    assert make_loss("supervised", {}) == Supervised()
    assert make_loss("odds", {"share": 0.5}) == OddsRatio(share=0.5)
    with pytest.raises(ValueError, match="no loss is called 'od'; there are cpo, dpo, kto, odds"):
        make_loss("od", {})
    with pytest.raises(ValueError, match="the loss odds has no option 'beta'; it has share"):
        make_loss("odds", {"beta": 1.0})
    with pytest.raises(ValueError, match="the loss supervised has no option 'beta'; it has none"):
        make_loss("supervised", {"beta": 1.0})


def test_the_page_names_every_part_of_the_interface() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {"units", "slopes", "group_size", "needs_reference", *LossInputs.__dataclass_fields__}
    assert not {name for name in names if f"`{name}`" not in page}
    assert all(hasattr(Loss, name) or name in LossInputs.__dataclass_fields__ for name in names)


def test_micro_batches_are_halved_between_groups() -> None:
    data = examples(6)
    assert [len(half) for half in halve([data], 2)] == [4, 2]
    assert [len(half) for half in halve([data])] == [3, 3]
    assert halve([data[:2]], 2) == [data[:2]]
    assert [one for half in halve([data], 2) for one in half] == data


def pairs(count: int) -> list[Example]:
    """Chosen, rejected, chosen, …; the same prompt for both of a pair."""
    made = []
    for one, other in zip(examples(count, seed=1, longest=20), examples(count, seed=2, longest=20), strict=True):
        made += [one, Example([*one.token_ids[:2], *other.token_ids[2:]], other.trained)]
    return made


def preference_run(
    decoder: Decoder, events: list[RunEvent], *, loss: str = "dpo", restored: Restored | None = None, **changes: Any
) -> TrainingRun:
    data = pairs(8)
    spec = run_spec(
        decoder,
        loss=LossSpec(name=loss, options={"beta": 0.5}),
        learning_rate=1e-2,
        lr_scheduler="constant",
        total_steps=12,
        warmup_steps=0,
        eval_every=6,
        micro_batch_size=2,
        seed=1,
        **changes,
    )
    feed = ExampleFeed(
        train=data,
        bins=[(index, index + 1) for index in range(0, len(data), 2)],
        recipe=spec.recipe,
        test=[data[:4], data[4:]],
    )
    return TrainingRun(
        decoder, spec, feed.epoch, feed.test, events.append, write_nothing, restored=restored, whole=True
    )


def test_a_run_with_a_loss_over_pairs(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh adapter is its own reference, so the first loss is ln 2; then chosen and rejected part."""
    monkeypatch.setitem(LOSSES, "dpo", documented_dpo())
    events: list[RunEvent] = []
    drive(preference_run(decoder, events))
    assert isinstance(events[-1], FinishedEvent)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0].metrics.keys() == {"rewards/margins", "rewards/accuracies"}
    assert steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)
    evals = [event for event in events if isinstance(event, EvalEvent)]
    assert len(evals) == 2
    assert evals[-1].loss < 0.3
    assert evals[-1].metrics["rewards/margins"] > 1
    assert evals[-1].metrics["rewards/accuracies"] == 1.0
    assert evals[-1].named == {"loss": evals[-1].loss, "accuracy": evals[-1].accuracy, **evals[-1].metrics}


def test_pairs_stay_together_where_memory_runs_out(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "dpo", documented_dpo())
    expected: list[RunEvent] = []
    drive(preference_run(decoder, expected))
    whole, sizes = run_module.collate, []

    def short(batch: Sequence[Example], device: torch.device) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2 and len(sizes) == 1:
            raise MemoryError
        return whole(batch, device)

    monkeypatch.setattr(run_module, "collate", short)
    events: list[RunEvent] = []
    drive(preference_run(decoder, events))
    assert sizes[0] == 4
    assert set(sizes[1:5]) == {2}
    losses = [[event.loss for event in seen if isinstance(event, StepEvent)] for seen in (events, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Broken(Loss):
        beta: float

        def __call__(self, inputs: LossInputs) -> LossValue:
            return LossValue((inputs.logprobs * float("nan")).sum())

    monkeypatch.setitem(LOSSES, "dpo", Broken)
    events: list[RunEvent] = []
    drive(preference_run(decoder, events))
    assert [getattr(event, "code", None) for event in events] == ["nan_loss"]


def test_a_loss_and_the_weights_of_examples_reach_ranks(decoder: Decoder) -> None:
    """They go there as messages."""
    loss = LossSpec(name="dpo", options={"beta": 0.5, "kind": "sigmoid"})
    spec = msgspec.msgpack.encode(run_spec(decoder, loss=loss))
    assert msgspec.msgpack.decode(spec, type=RunSpec).loss == loss
    example = Example([1, 2], [False, True], weight=-0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(example), type=Example) == example


def test_a_loss_that_is_unknown_is_no_run(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="no loss is called 'dpa'"):
        preference_run(decoder, [], loss="dpa")


def test_the_reference_is_computed_once_a_row(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 pairs of two sequences, 6 epochs over them and two evaluations of the same."""
    scored: list[int] = []
    whole = step_module.score_targets

    def counted(head: Any, hidden: Any, batch: Any) -> Any:
        scored.append(len(batch.sequences))
        return whole(head, hidden, batch)

    monkeypatch.setattr(step_module, "score_targets", counted)
    events: list[RunEvent] = []
    drive(preference_run(decoder, events))
    assert sum(scored) == 16
    assert sum(isinstance(event, StepEvent) for event in events) == 12


def test_a_run_over_pairs_that_goes_on_ends_the_same(decoder: Decoder, tmp_path: Path) -> None:
    """After one of two steps of the first epoch: some rows have their reference, and others not."""
    whole: list[RunEvent] = []
    straight = preference_run(decoder, whole, save_every=1, lora_dropout=0.1)
    drive(straight)
    (tmp_path / "snapshot").mkdir()
    straight.take_snapshot(1).write(tmp_path / "snapshot")
    restored = read_snapshot(tmp_path / "snapshot")
    assert len(restored.reference["lengths"]) == 8
    rest: list[RunEvent] = []
    resumed = preference_run(decoder, rest, save_every=1, lora_dropout=0.1, restored=restored)
    drive(resumed)
    found, expected = resumed._lora.capture(), straight._lora.capture()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [[event.loss for event in seen if isinstance(event, StepEvent)] for seen in (whole, rest)]
    assert losses[0][1:] == losses[1]
