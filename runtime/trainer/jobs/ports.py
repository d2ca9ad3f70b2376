"""What jobs need from the rest: somebody to read recipes, to train, and to publish. Tests fill these with fakes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.trainer.events import EvalEvent, RunEvent, StepEvent


class PreparedJob(Protocol):
    """A recipe that was read, checked and planned."""

    @property
    def name(self) -> str:
        """Of the adapter that will be published. Empty: the job's id is its name."""

    @property
    def summary(self) -> dict[str, Any]:
        """The plan for people, as JSON has it. `save_total_limit`, where it is there, is acted on: the most
        checkpoints that are kept."""

    @property
    def total_steps(self) -> int: ...

    @property
    def plan(self) -> object:
        """What `Runs.start` needs; opaque here."""

    def publish_when(self, metrics: dict[str, float]) -> tuple[bool, str]:
        """Whether the result is good enough to publish, and why (not). `metrics`: see
        `JobReader.gate_metrics`."""


class Preparer(Protocol):
    def prepare(self, recipe_yaml: bytes, uploads: dict[str, Path]) -> PreparedJob:
        """Read a recipe and its data; `uploads` has the files sent along, by the names they were sent under.

        Blocks, and is called in a thread of its own. Raises `RequestError` (400, 403, 404) with `param`.
        """


class Snapshot(Protocol):
    """Everything to go on from one step, immutable."""

    def write(self, directory: Path) -> None:
        """Write all files into this empty directory and fsync them. Blocks, and runs in a worker thread.

        For a finished run, its sub-directory `adapter_files` holds the adapter in PEFT's format.
        """


class RunHandle(Protocol):
    """A run. Its methods are called on the event loop; the first three take effect at the next optimiser
    step's end, and the event that says so follows."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def cancel(self) -> None: ...

    async def take_snapshot(self, step: int) -> Snapshot:
        """What was captured at `step`; after the checkpoint, paused or finished event of that step."""

    def close(self) -> None:
        """Let everything go, wherever the run is. No event follows."""


class Runs(Protocol):
    def start(
        self,
        job_id: str,
        prepared: PreparedJob,
        resume_from: Path | None,
        on_event: Callable[[RunEvent], None],
    ) -> RunHandle:
        """Start training, from the beginning or from a snapshot's directory.

        Called on the event loop, where `on_event` is called too, in order. Raises `RequestError`.
        """


class Publisher(Protocol):
    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        """Make the PEFT files in `source` the newest version of `name`, and return its label (`name@3`).

        A job that was published before a crash is published again after it: the same `job_id` gives the
        version that is there. Raises `RequestError`.
        """

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        """Let the PEFT files in these folders be asked for, by the steps that they are of; those that were there
        before and are not among them, no longer. Not stored: without a job that runs there are none."""


class Meters(Protocol):
    """Where numbers for Prometheus go: `runtime.metrics.Metrics`."""

    def on_train_step(self, event: StepEvent) -> None: ...

    def on_eval(self, event: EvalEvent) -> None: ...

    def on_jobs(self, counts: dict[str, int]) -> None: ...


@dataclass(frozen=True)
class Ports:
    """All of them."""

    preparer: Preparer
    runs: Runs
    publisher: Publisher
    meters: Meters
