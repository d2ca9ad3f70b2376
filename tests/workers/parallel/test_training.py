"""Training on two ranks over gloo against one rank in this process: the same losses, norms and adapters."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoints.peft import write_adapter
from runtime.engine.assembly import Assembled, assemble
from runtime.events import (
    CancelledEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    GenerateEvent,
    PausedEvent,
    RunEvent,
    StepEvent,
)
from runtime.messages import SamplingParams, Submission
from runtime.model.lora import Adapter
from runtime.model.vocabulary import RowTargets
from runtime.trainer.course import Restored, read_snapshot
from runtime.trainer.data.example import Example
from runtime.trainer.recipe import Dataset, Recipe
from runtime.trainer.schedule import ExampleFeed, pack
from runtime.trainer.sliced_run import RunSpec, SlicedRun
from runtime.workers.parallel.executor import DistributedExecutor
from settings.load import load
from tests.tiny import VOCAB_SIZE
from tests.trainer.tiny_training import drive, examples, run_spec

DATA = examples(12, seed=1)
FEED = ExampleFeed(
    train=DATA[:8],
    bins=pack([len(one) for one in DATA[:8]], 1),
    recipe=Recipe(
        adapter="lora", datasets=(Dataset(path="rows.jsonl"),), learning_rate=1e-4, micro_batch_size=2, seed=3
    ),
    test=[DATA[8:10], DATA[10:]],
)


def assembled(model: Path, **overrides: Any) -> Assembled:
    flags = {"model": str(model), "num_blocks": 64, "threads": 1, **overrides}
    return assemble(load(flags=flags, env={}).settings)


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> Iterator[tuple[Assembled, Assembled]]:
    """Two ranks, and one."""
    threads = torch.get_num_threads()
    several = assembled(tiny_model, tp=2, rank_timeout=30)
    try:
        yield several, assembled(tiny_model)
    finally:
        several.engine.close()
        torch.set_num_threads(threads)


def spec(model: Assembled, **changes: Any) -> RunSpec:
    return run_spec(model.decoder, lora_dropout=0.1, eval_every=3, gradient_checkpointing=True, **changes)


def start(
    model: Assembled,
    events: list[RunEvent],
    made: RunSpec | None = None,
    restored: Restored | None = None,
    feed: ExampleFeed = FEED,
) -> SlicedRun:
    one = made or spec(model)

    def write(directory: Path, adapter: Adapter) -> None:
        write_adapter(directory, adapter.layers, one.shape, model.lora_base, vocabulary=adapter.vocabulary)

    return model.make_run(one, feed, events.append, write, restored)


def steps(events: list[RunEvent]) -> list[tuple[int, float, float]]:
    return [(event.step, event.loss, event.grad_norm) for event in events if isinstance(event, StepEvent)]


def saved(run: SlicedRun, step: int, directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    run.take_snapshot(step).write(directory)
    return load_file(directory / "adapter_files" / "adapter_model.safetensors")


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


def test_a_run_equals_that_of_one_rank(models: tuple[Assembled, Assembled], tmp_path: Path) -> None:
    """Losses, norms, evaluations and adapter; and from a checkpoint of one side the other goes on to the same end."""
    events: tuple[list[RunEvent], list[RunEvent]] = ([], [])
    runs = [start(model, seen) for model, seen in zip(models, events, strict=True)]
    for run in runs:
        drive(run, 0.02)  # cut into many slices
    several, one = events
    assert [type(event) for event in several] == [type(event) for event in one]
    assert len(steps(one)) == 6
    for found, expected in zip(steps(several), steps(one), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    evals = [[event.loss for event in seen if isinstance(event, EvalEvent)] for seen in events]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)
    finished = one[-1]
    assert isinstance(finished, FinishedEvent)
    ends = [saved(run, 6, tmp_path / str(index)) for index, run in enumerate(runs)]
    close(*ends)
    for index, run in enumerate(runs):
        saved(run, 2, tmp_path / f"at 2 of {index}")
    for index, model in enumerate(models):
        again: list[RunEvent] = []
        run = start(model, again, restored=read_snapshot(tmp_path / f"at 2 of {1 - index}"))
        drive(run)
        assert [step for step, _, _ in steps(again)] == [3, 4, 5, 6]
        close(saved(run, 6, tmp_path / f"again {index}"), ends[1])


NEW = tuple(range(VOCAB_SIZE, VOCAB_SIZE + 2))
ROWS = {
    "new tokens": RowTargets(embedding=(7, *NEW), head=(7, *NEW), fresh=NEW, size=VOCAB_SIZE + 2),
    "copies": RowTargets(copies=("embedding", "head"), fresh=NEW, size=VOCAB_SIZE + 2),
}


def with_new_tokens(example: Example) -> Example:
    ids = list(example.token_ids)
    ids[1], ids[-1] = NEW
    return Example(ids, example.trained)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_the_vocabulary_equal_those_of_one_rank(
    models: tuple[Assembled, Assembled], tmp_path: Path, kind: str
) -> None:
    """Trained on two ranks and on one; and the result served by both."""
    feed = dataclasses.replace(FEED, train=[with_new_tokens(one) for one in FEED.train])
    events: tuple[list[RunEvent], list[RunEvent]] = ([], [])
    ends, answers = [], []
    for index, (model, seen) in enumerate(zip(models, events, strict=True)):
        made = spec(model, rows=ROWS[kind])
        run = start(model, seen, made, feed=feed)
        drive(run)
        ends.append(saved(run, 6, tmp_path / str(index)))
    for found, expected in zip(*map(steps, events), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    close(*ends)
    assert sum(tensor.shape[0] >= 3 and "lora" not in name for name, tensor in ends[0].items()) == 2
    own = f"own {kind}"
    for model in models:
        engine = model.engine
        engine.prepare_adapter(own, str(tmp_path / "1" / "adapter_files"))
        engine.load_adapter(own, engine.tokenizer.with_tokens((), rows=VOCAB_SIZE + 2))
        greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0, logit_bias={NEW[0]: 1.0})
        found = []
        for adapter in (own, ""):
            params = msgspec.structs.replace(greedy, logit_bias=greedy.logit_bias if adapter else {})
            prompt = [5, 9, NEW[1] if adapter else 7, 11]
            engine.submit(Submission(request_id=adapter or "base", prompt_ids=prompt, params=params, adapter=adapter))
        while engine.busy:
            for output in engine.step():
                assert output.error is None
                found.append((output.request_id, output.token_ids))
        answers.append(sorted(found))
        engine.unload_adapter(own)
    assert answers[0] == answers[1]


def test_pause_resume_and_cancel(models: tuple[Assembled, Assembled]) -> None:
    events: list[RunEvent] = []
    run = start(models[0], events)
    run.pause()
    drive(run)
    assert isinstance(events[-1], PausedEvent)
    assert not run.ready
    run.resume()
    run.work(0.001)
    run.cancel()
    drive(run)
    assert isinstance(events[-1], CancelledEvent)
    assert run.pacer.done


def test_a_snapshot_of_another_run_is_refused(models: tuple[Assembled, Assembled], tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run = start(models[0], events)
    while not any(isinstance(event, CheckpointEvent) for event in events):
        run.work(0.05)
    run.cancel()
    drive(run)
    saved(run, 2, tmp_path / "snapshot")
    targets = {(0, "qkv"): ("q",)}
    failed: list[RunEvent] = []
    drive(start(models[0], failed, spec(models[0], targets=targets), read_snapshot(tmp_path / "snapshot")))
    (event,) = failed
    assert isinstance(event, FailedEvent)
    assert event.code == "bad_checkpoint"
    assert "adapter of another shape" in event.message


def test_a_run_outlives_its_ranks(models: tuple[Assembled, Assembled], tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run = start(models[0], events)
    while not any(isinstance(event, CheckpointEvent) for event in events):
        run.work(0.05)
    executor = models[0].engine._executor
    assert isinstance(executor, DistributedExecutor)
    executor.ranks.give_up("a test")
    assert not run.ready
    models[0].engine.recover()
    drive(run)
    plain = start(models[1], [])
    drive(plain)
    assert [step for step, _, _ in steps(events)][-4:] == [3, 4, 5, 6]
    close(saved(run, 6, tmp_path / "several"), saved(plain, 6, tmp_path / "one"))


def test_answers_are_given_to_all_ranks(models: tuple[Assembled, Assembled]) -> None:
    """The best weights are then the same on both sides, and a pause waits for no answer."""
    ends = []
    for model in models:
        events: list[RunEvent] = []
        made = spec(model, do_causal_lm_eval=True, metric_for_best_model="bleu", total_steps=6)
        run = start(model, events, made)
        values = {3: 2.0, 6: 1.0}
        run.pause()
        while not run.pacer.done:
            drive(run)
            last = events[-1]
            if isinstance(last, PausedEvent):
                run.take_snapshot(last.step)
                run.resume()
            elif isinstance(last, GenerateEvent):
                snapshot = run.take_snapshot(last.step)
                assert snapshot.parameters
                assert not snapshot.optimizer
                if last.step == 3 and not any(isinstance(event, PausedEvent) and event.step == 3 for event in events):
                    run.pause()
                else:
                    run.answer({"bleu": values[last.step]})
        evals = [event for event in events if isinstance(event, EvalEvent)]
        assert [(event.step, event.metrics["bleu"]) for event in evals] == [(3, 2.0), (6, 1.0)]
        assert isinstance(events[-1], FinishedEvent)
        ends.append(events[-1])
    assert ends[0] == ends[1]
    assert ends[0].best_step == 3
