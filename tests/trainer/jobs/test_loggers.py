"""Loggers of other tools: fakes of theirs record what they are given; none can end a job, or hold it up."""

import asyncio
import importlib.util
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from runtime.events import EvalEvent
from runtime.trainer.jobs.loggers import JobLoggers
from runtime.trainer.recipe import Document, Recipe, recipe_from
from tests.trainer.jobs.fakes import FakePreparer, World, step_event

ALL = {"use_tensorboard": True, "wandb_project": "newts", "use_mlflow": True}


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}]}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


class Tools:
    """Modules in the place of tensorboard, wandb and mlflow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logged: list[tuple[str, str, float, int]] = []
        self.opened: list[Any] = []
        self.closed: list[str] = []
        self.ended = threading.Event()
        """Set when TensorBoard and W&B are closed."""
        self.fails = ""
        self.blocks = threading.Event()
        self.blocks.set()
        run = SimpleNamespace(log=self._wandb, finish=lambda: self._close("wandb"))
        writer = SimpleNamespace(add_scalar=self._tensorboard, close=lambda: self._close("tensorboard"))
        client = SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: self.opened.append(name) or "7",
            create_run=lambda experiment, run_name: SimpleNamespace(info=SimpleNamespace(run_id=run_name)),
            log_metric=lambda run_id, name, value, step: self._note("mlflow", name, value, step),
            set_terminated=lambda run_id: self.closed.append("mlflow"),
        )
        modules = {
            "tensorboard.summary": SimpleNamespace(Writer=lambda folder: self.opened.append(folder) or writer),
            "wandb": SimpleNamespace(init=lambda **keys: self.opened.append(keys) or run, Settings=dict),
            "mlflow": SimpleNamespace(MlflowClient=lambda tracking_uri: self.opened.append(tracking_uri) or client),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]

    def _close(self, name: str) -> None:
        self.closed.append(name)
        if {"tensorboard", "wandb"} <= set(self.closed):
            self.ended.set()

    def _tensorboard(self, name: str, value: float, step: int) -> None:
        self._note("tensorboard", name, value, step)

    def _wandb(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._note("wandb", name, value, step)

    def _note(self, tool: str, name: str, value: float, step: int) -> None:
        self.blocks.wait(10)
        if tool == self.fails:
            raise OSError("no space")
        self.logged.append((tool, name, value, step))


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(monkeypatch)


def end(loggers: JobLoggers, patience: float = 10) -> None:
    thread = loggers.end()
    assert thread is not None
    thread.join(patience)
    assert not thread.is_alive()


EVAL = EvalEvent(step=1, loss=0.5, accuracy=0.75, tokens=3, metrics={"exact_match": 0.25})


def test_every_tool_gets_every_number(tools: Tools, tmp_path: Path) -> None:
    problems: list[str] = []
    loggers = JobLoggers(recipe(**ALL), "ftjob-1", tmp_path, problems.append)
    loggers.note(step_event(1))
    loggers.note(EVAL)
    loggers.note("anything else")
    end(loggers)
    assert problems == []
    assert sorted(tools.closed) == ["mlflow", "tensorboard", "wandb"]
    for tool in ("tensorboard", "wandb", "mlflow"):
        found = {(name, step): value for one, name, value, step in tools.logged if one == tool}
        assert found[("train/loss", 1)] == 1.0
        assert found[("train/learning_rate", 1)] == 1e-4
        assert found[("eval/exact_match", 1)] == 0.25
    (run,) = (one for one in tools.opened if isinstance(one, dict))
    assert (run["mode"], run["project"], run["name"]) == ("offline", "newts", "ftjob-1")
    assert run["dir"] == str(tmp_path / "wandb")
    assert (tmp_path / "mlflow").as_uri() in tools.opened
    assert str(tmp_path / "tensorboard") in tools.opened


def test_one_that_fails_is_left_out(tools: Tools, tmp_path: Path) -> None:
    tools.fails = "wandb"
    problems: list[str] = []
    loggers = JobLoggers(recipe(**ALL), "ftjob-1", tmp_path, problems.append)
    for step in (1, 2):
        loggers.note(step_event(step))
    end(loggers)
    assert problems == ["The logger wandb failed, and logs nothing more: OSError: no space"]
    assert {(tool, step) for tool, _, _, step in tools.logged} == {
        (tool, step) for tool in ("tensorboard", "mlflow") for step in (1, 2)
    }


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    problems: list[str] = []
    loggers = JobLoggers(recipe(use_wandb=True), "ftjob-1", tmp_path, problems.append)
    end(loggers)
    assert problems == ["Nothing is logged to wandb, which is not installed: pip install 'eft-server[wandb]'."]


TRACKIO = """
import json, os, sys
class Run:
    def log(self, values, step):
        if step == 9:
            sys.exit(3)
        print(json.dumps([values["train/loss"], step]), file=file)
def init(project, name, **options):
    global file
    file = open(os.environ["TRACKIO_DIR"] + "/run", "a")
    print(json.dumps([project, name, options["resume"], os.environ.get("TRACKIO_SPACE_ID")]), file=file)
    return Run()
def finish():
    print("finished", file=file)
"""
"""A module in the place of trackio, which is run in a process of its own."""


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trackio.py").write_text(TRACKIO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")


def test_trackio_logs_into_a_folder_of_the_job(trackio: None, tmp_path: Path) -> None:
    problems: list[str] = []
    loggers = JobLoggers(recipe(use_trackio=True, trackio_project_name="newts"), "ftjob-1", tmp_path, problems.append)
    for step in (1, 2):
        loggers.note(step_event(step))
    end(loggers, 60)  # a process is started
    assert problems == []
    assert (tmp_path / "trackio" / "run").read_text().splitlines() == [
        '["newts", "ftjob-1", "allow", null]', "[1.0, 1]", "[0.5, 2]", "finished",
    ]  # fmt: skip


def test_a_process_of_trackio_that_dies_is_named(trackio: None, tmp_path: Path) -> None:
    problems: list[str] = []
    loggers = JobLoggers(recipe(use_trackio=True), "ftjob-1", tmp_path, problems.append)
    loggers.note(step_event(9))
    end(loggers, 60)  # a process is started
    (problem,) = problems
    assert problem.startswith("The logger trackio failed, and logs nothing more:")


def test_a_slow_one_holds_nothing_up(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.trainer.jobs.loggers.MAX_WAITING", 5)
    tools.blocks.clear()
    loggers = JobLoggers(recipe(use_tensorboard=True), "ftjob-1", tmp_path, print)
    began = time.monotonic()
    for step in range(1, 50):
        loggers.note(step_event(step))
    assert time.monotonic() - began < 5  # each would have waited for ten seconds
    tools.blocks.set()


def test_which_are_used() -> None:
    assert recipe().loggers == ()
    assert recipe(use_wandb=False, wandb_project="x").loggers == ()
    assert recipe(wandb_project="x").loggers == ("wandb",)
    assert recipe(**ALL, use_trackio=True).loggers == ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.mark.anyio
async def test_a_job_with_loggers(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.fails = "mlflow"
    prepare = FakePreparer.prepare

    def prepared(self: FakePreparer, *args: Any) -> Any:
        made = prepare(self, *args)
        object.__setattr__(made, "recipe", recipe(**ALL))
        return made

    monkeypatch.setattr(FakePreparer, "prepare", prepared)
    world = World(tmp_path)
    await world.start()
    try:
        job = await world.submit("name: shop", "steps: 3")
        await world.until(job.id, "succeeded")
        assert await asyncio.to_thread(tools.ended.wait, 10)
        await world.settle()
        _, events = await world.manager.store.events(job.id, after=0, limit=100)
    finally:
        await world.stop()
    assert {step for tool, _, _, step in tools.logged if tool == "wandb"} == {1, 2, 3}
    assert any("The logger mlflow failed" in event.message for event in events)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboards_own_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found, unused-ignore]
        EventAccumulator,
    )

    loggers = JobLoggers(recipe(use_tensorboard=True), "ftjob-1", tmp_path, lambda problem: pytest.fail(problem))
    loggers.note(step_event(1))
    loggers.note(replace(step_event(2), loss=0.125))
    end(loggers)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = read.Tensors("train/loss") if "train/loss" in read.Tags()["tensors"] else read.Scalars("train/loss")
    assert [one.step for one in found] == [1, 2]
