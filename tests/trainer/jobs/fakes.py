"""Training without a model: a run that steps when it is told to, a preparer that reads `name: value` lines."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import InvalidRequest
from runtime.events import (
    CancelledEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    ProgressEvent,
    ReadingEvent,
    RunEvent,
    StepEvent,
)
from runtime.support.database import Database
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.records import Job, JobSubmission, PreparedJob
from runtime.trainer.jobs.rows import SCHEMA
from runtime.trainer.recipe import Publish


@dataclass(frozen=True, eq=False, kw_only=True)
class FakePrepared(PreparedJob):
    publish: Publish = field(default_factory=Publish)
    plan: object = None
    good: bool = True

    def publish_when(self, metrics: dict[str, float]) -> tuple[bool, str]:
        return self.good, f"train_loss is {metrics.get('train_loss')}"


class FakePreparer:
    """Recipes are lines such as `name: x`, `steps: 3`, `every: 2`, `keep: 1`, `good: no`, `data: file`, `reads: 9`."""

    def __init__(self) -> None:
        self.calls = 0
        self.hold = False
        """Until it is False again, recipes are being read."""
        self.kept: list[Path | None] = []
        """Files for prepared data, a call each."""

    def prepare(
        self,
        recipe_yaml: bytes,
        uploads: Mapping[str, Path],
        kept: Path | None,
        on_reading: Callable[[ReadingEvent], None] | None = None,
    ) -> FakePrepared:
        self.calls += 1
        keys = dict(line.split(": ", 1) for line in recipe_yaml.decode().splitlines() if ": " in line)
        if "reads" in keys and on_reading is not None:
            on_reading(ReadingEvent(rows=int(keys["reads"]), tokens=4321, seconds=2.0))
        while self.hold:
            time.sleep(0.005)
        if "name" not in keys:
            raise InvalidRequest("name: missing.", param="name")
        if "exit" in keys:
            os._exit(9)
        if "data" in keys and keys["data"] not in uploads:
            raise InvalidRequest(f"{keys['data']} was not sent.", param="datasets", code="data_not_found")
        self.kept.append(kept)
        if kept is not None:
            kept.write_bytes(recipe_yaml)
        rows = sum(path.read_bytes().count(b"\n") for path in uploads.values())
        steps = int(keys.get("steps", "3"))
        summary: dict[str, Any] = {"total_steps": steps, "rows": rows, "every": int(keys.get("every", "0"))}
        for key in ("memory_bytes", "job_priority"):
            if key in keys:
                summary[key] = int(keys[key])
        summary["launched"] = "launched" in keys
        if "slow" in keys:
            summary["slow"] = True
        if "warning" in keys:
            summary["warnings"] = [keys["warning"]]
        if "keep" in keys:
            summary["save_total_limit"] = int(keys["keep"])
        return FakePrepared(
            name=keys["name"].strip("'"), total_steps=steps, summary=summary, good=keys.get("good") != "no"
        )


class FakeSnapshot:
    def __init__(self, step: int, error: OSError | None = None) -> None:
        self.step = step
        self.error = error

    def write(self, directory: Path) -> None:
        (directory / "adapter_files").mkdir()
        (directory / "adapter_files" / "adapter_model.safetensors").write_text(f"weights of step {self.step}")
        (directory / "step").write_text(str(self.step))
        if self.error is not None:
            raise self.error


class FakeRun:
    """Steps by `step`, or all by itself where it was made to."""

    def __init__(self, runs: "FakeRuns", job_id: str, prepared: Any, first: int, emit: Callable[[RunEvent], None]):
        self._runs = runs
        self.job_id = job_id
        self._prepared = prepared
        self.done = first
        self.emit = emit
        self.paused = self.ended = self.closed = False
        self.wish = ""

    def pause(self) -> None:
        self.wish = "pause"

    def resume(self) -> None:
        assert self.paused
        self.paused, self.wish = False, ""
        self._runs.schedule(self)

    def cancel(self) -> None:
        self.wish = "cancel"
        if self.paused:
            self.step()

    async def take_snapshot(self, step: int) -> Callable[[Path], None]:
        assert step <= self.done
        await asyncio.sleep(0)
        return FakeSnapshot(step, self._runs.disk_error).write

    def close(self) -> None:
        self.closed = True

    def step(self) -> None:
        """One optimiser step, and what follows it."""
        if self.ended or self.closed or (self.paused and self.wish != "cancel"):
            return
        if self.wish == "cancel":
            self.ended = True
            self.emit(CancelledEvent(step=self.done))
            return
        if self.done < self._prepared.total_steps:
            if self._prepared.summary.get("slow"):
                self.emit(progress_event(self.done, self._prepared.total_steps))
            self.done += 1
            self.emit(step_event(self.done))
        every = self._prepared.summary["every"]
        if self.done >= self._prepared.total_steps:
            self.ended = True
            self.emit(EvalEvent(step=self.done, loss=0.5, accuracy=0.75, tokens=10))
            self.emit(FinishedEvent(step=self.done, best_step=self.done))
        elif self.wish == "pause":
            self.paused = True
            self.emit(PausedEvent(step=self.done))
        elif every and self.done % every == 0:
            self.emit(CheckpointEvent(step=self.done, best=False))

    def fail(self, code: str) -> None:
        self.ended = True
        self.emit(FailedEvent(step=self.done, code=code, message="The loss is not a number."))


class FakeRuns:
    """`steps_itself`: runs go on by themselves, a step a turn of the loop."""

    def __init__(self, *, steps_itself: bool = True, at_once: int = 1) -> None:
        self.steps_itself = steps_itself
        self.at_once = at_once
        self.started: list[tuple[str, int]] = []
        """Job and the step that it began after."""
        self.runs: list[FakeRun] = []
        self.disk_error: OSError | None = None

    def start(
        self, job_id: str, prepared: Any, resume_from: Path | None, on_event: Callable[[RunEvent], None]
    ) -> FakeRun:
        first = 0 if resume_from is None else int((resume_from / "step").read_text())
        at_work = [run for run in self.runs if not (run.closed or run.ended or run.paused)]
        assert len(at_work) < self.at_once, "too many runs at once"
        self.started.append((job_id, first))
        self.runs.append(run := FakeRun(self, job_id, prepared, first, on_event))
        self.schedule(run)
        return run

    @property
    def current(self) -> FakeRun:
        return self.runs[-1]

    def schedule(self, run: FakeRun) -> None:
        if self.steps_itself and not (run.ended or run.closed or run.paused):
            run.step()
            asyncio.get_running_loop().call_later(0.001, self.schedule, run)


class FakePublisher:
    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.published: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.offered: dict[str, dict[int, str]] = {}
        """By the names of those who offer: what is there at which step."""

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        self.offered[name] = {
            step: (folder / "adapter_model.safetensors").read_text() for step, folder in folders.items()
        }

    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        if self.error is not None:
            raise self.error
        text = (source / "adapter_model.safetensors").read_text()
        self.published.append({"name": name, "weights": text, "step": step, "metrics": metrics})
        return self.versions.setdefault(job_id, f"{name}@{len(self.versions) + 1}")


class FakeEngine:
    """`JobEngine` of the three."""

    def __init__(self, preparer: FakePreparer, runs: FakeRuns, publisher: FakePublisher) -> None:
        self.preparer, self.runs, self.publisher = preparer, runs, publisher
        self.memory = 1000
        self.base_fingerprint = "base"

    def prepare(self, *args: Any) -> FakePrepared:
        prepared = self.preparer.prepare(*args)
        prepared.summary["base_fingerprint"] = self.base_fingerprint
        return prepared

    def start(self, *args: Any) -> FakeRun:
        return self.runs.start(*args)

    def memory_for_jobs(self) -> int:
        return self.memory

    async def publish(self, **more: Any) -> str:
        return await self.publisher.publish(**more)

    async def offer(self, **more: Any) -> None:
        await self.publisher.offer(**more)


class FakeMeters:
    def __init__(self) -> None:
        self.steps: list[StepEvent] = []
        self.evals: list[EvalEvent] = []
        self.counts: dict[str, int] = {}

    def on_train_step(self, event: StepEvent, job_id: str) -> None:
        self.steps.append(event)

    def on_train_pause(self, job_id: str) -> None:
        pass

    def on_eval(self, event: EvalEvent) -> None:
        self.evals.append(event)

    def on_jobs(self, counts: dict[str, int]) -> None:
        self.counts = counts


@dataclass
class World:
    """A manager over fakes, in a state directory that outlives it."""

    path: Path
    steps_itself: bool = True
    max_waiting: int = 100
    max_running: int = 1
    base_fingerprint: str = "base"
    preparer: FakePreparer = field(default_factory=FakePreparer)
    publisher: FakePublisher = field(default_factory=FakePublisher)
    meters: FakeMeters = field(default_factory=FakeMeters)

    async def start(self) -> JobManager:
        self.runs = FakeRuns(steps_itself=self.steps_itself, at_once=self.max_running)
        self.database = Database(self.path, [SCHEMA])
        engine = FakeEngine(self.preparer, self.runs, self.publisher)
        engine.base_fingerprint = self.base_fingerprint
        self.manager = JobManager(
            self.database,
            JobDirectories(self.path),
            engine,
            self.meters,
            max_waiting=self.max_waiting,
            max_running=self.max_running,
        )
        await self.manager.start()
        return self.manager

    async def stop(self, timeout: float = 5.0) -> None:
        await self.manager.stop(timeout)
        self.database.close()

    async def crash(self) -> None:
        """End as a process that is killed: nothing more is stored."""
        await self.manager.stop(0.0, crashed=True)
        self.database.close()

    async def submit(self, *lines: str, **more: Any) -> Job:
        recipe = "\n".join(lines).encode()
        asked = JobSubmission(id=self.manager.new_id(), recipe=recipe, digest=recipe.decode(), **more)
        return (await self.manager.submit(asked))[0]

    async def until(self, job_id: str, *states: str) -> Job:
        """The job once it is in one of these states."""
        async with asyncio.timeout(10):
            while True:
                ticket = self.manager.feed.ticket(job_id)
                job = await self.manager.store.get(job_id)
                if job.state in states:
                    return job
                assert not job.ended, f"{job.state}: {job.error}"
                await self.manager.feed.until(ticket, 0.1)

    async def statuses(self, job_id: str) -> list[str]:
        """Those that the job's events tell of, in their order."""
        _, events = await self.manager.store.events(job_id, after=0, limit=1000)
        return [event.data["status"] for event in events if "status" in event.data]

    async def step(self, count: int = 1) -> None:
        """Let the run take steps, and what it reports be stored."""
        for _ in range(count):
            self.runs.current.step()
            await self.settle()

    async def settle(self) -> None:
        """Until nothing is under way in the manager's lane, nor on its disk, which others may keep busy."""
        quiet = 0
        async with asyncio.timeout(20):
            while quiet < 20:
                await self.database.call(lambda c: None)
                await asyncio.sleep(0.001)
                quiet = 0 if self.manager._disk._running else quiet + 1


def progress_event(step: int, total: int) -> ProgressEvent:
    """Halfway through the step after `step`, of 20 seconds."""
    left = (total - step - 0.5) * 20.0
    return ProgressEvent(step=step, total_steps=total, activity="train", fraction=0.5, seconds=10.0, seconds_left=left)


def step_event(step: int) -> StepEvent:
    return StepEvent(
        step=step, epoch=step / 10, loss=1 / step, learning_rate=1e-4, grad_norm=1.0, tokens=20, trained_tokens=10,
        accuracy=0.5, seconds=2.0, busy_seconds=1.5,
    )  # fmt: skip
