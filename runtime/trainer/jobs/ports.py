"""The interface through which jobs reach the engine. The engine's side implements it; tests fill it with fakes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from runtime.events import RunEvent
from runtime.trainer.jobs.records import PreparedJob


class RunHandle(Protocol):
    """A run. Its methods are called on the event loop; the first three take effect at the next optimiser
    step's end, and the event that says so follows."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def cancel(self) -> None: ...

    async def take_snapshot(self, step: int) -> Callable[[Path], None]:
        """Writer of the snapshot of `step`, with everything to continue from there; to be called after the checkpoint,
        paused or finished event of that step.

        The writer writes all files into an empty directory and fsyncs them. It blocks, and runs in a worker thread. For
        a finished run, the sub-directory `adapter_files` holds the adapter in PEFT's format.
        """

    def close(self) -> None:
        """Release everything, at any point of the run. No event follows."""


class JobEngine(Protocol):
    """The engine, as jobs need it: to read recipes, to train, and to publish."""

    def prepare(self, recipe: bytes, uploads: Mapping[str, Path], kept: Path | None) -> PreparedJob:
        """Read a recipe and its data; `uploads` has the files sent along, by the names they were sent under.

        `kept`: file for the prepared data of a job, which is read from there where it was written before; None for a
        recipe that is not to become a job. Blocks, and is called in a thread of its own. Raises `RequestError` (400,
        403, 404) with `param`.
        """

    def start(
        self, job_id: str, prepared: PreparedJob, resume_from: Path | None, on_event: Callable[[RunEvent], None]
    ) -> RunHandle:
        """Start the training of a job, from the beginning or from a snapshot's directory, one run at a time.

        Called on the event loop, where `on_event` is called too, in order. Raises `RequestError`.
        """

    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        """Make the PEFT files in `source` the newest version of `name`, and return its label (`name@3`).

        A job that was published before a crash is published again after it: the same `job_id` gives the
        version that is there. Raises `RequestError`.
        """

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        """Make the PEFT files in these folders available to requests, by their steps, and withdraw earlier ones that
        are not among them. Not stored: without a job that runs there are none."""
