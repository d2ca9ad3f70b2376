"""A launched job as the server sees it: torchrun as a child, its reports as events, restarts where a rank is killed or
hangs."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.events import CancelledEvent, FailedEvent, FinishedEvent, PausedEvent, RestartEvent, RunEvent
from runtime.support.durable import error_code, reason, remove, sync_file
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.trainer.launched.agent_process import (
    PROGRAM,
    AgentProcess,
    AgentRecord,
    LeftProcess,
    end_left_behind,
    kill,
    wait_for_end,
)
from runtime.trainer.launched.files import (
    FAILED,
    FAILED_CODE,
    LOG,
    PAUSE,
    REQUEST,
    STEP,
    JobFolder,
    LaunchEnd,
    LaunchSpec,
    RankReport,
    ReportReader,
    newest_checkpoint,
)
from runtime.trainer.launched.stall import StallWatch
from runtime.trainer.schedule import ExampleFeed

_log = get_logger("launched")

TAIL_SECONDS = 0.1
"""Time between looks at the reports."""
EXIT_SECONDS = 20.0
"""Time in which torchrun must have ended after the last report, before it is killed."""
Ended = (FinishedEvent, FailedEvent, PausedEvent)


class Nodes(Struct, frozen=True, kw_only=True):
    """Nodes that the ranks of a job run on."""

    per_node: int
    """Ranks of a node."""
    count: int = 1
    rendezvous: str | None = None
    """`host:port` at which nodes meet; None: one node, by itself."""

    def arguments(self, folder: JobFolder, name: str, *, max_restarts: int) -> list[str]:
        """torchrun's, for one node. `name`: of the job, by which nodes know that they belong together."""
        shared = ["--nproc-per-node", str(self.per_node)]
        if self.rendezvous is None:
            # By a file, which only this user reads: torchrun unpickles what it finds where its agents meet, and a port
            # is open to all that reach the machine.
            shared += ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder.meeting)]
            shared += ["--rdzv-conf", "store_type=file", "--rdzv-id", name, "--local-addr", "127.0.0.1"]
        else:
            shared += ["--nnodes", str(self.count), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous]
            shared += ["--rdzv-id", name, "--max-restarts", str(max_restarts)]
        return [*shared, "-m", PROGRAM, "rank", str(folder.path)]


@dataclass(frozen=True, eq=False, kw_only=True)
class LaunchJob:
    """One job, as its processes are started."""

    name: str
    folder: JobFolder
    write: Callable[[JobFolder], tuple[LaunchSpec, ExampleFeed]]
    """Makes the job for the ranks, and may write into its folder. Blocks, and is called on a thread."""
    nodes: Nodes
    environment: Mapping[str, str]
    devices: threading.Lock
    """Held by the job whose processes have the devices; others wait for it."""
    max_restarts: int
    """Starts after ranks were killed or hung, without a step in between."""
    stall_timeout: float
    """Seconds without a move of any rank after which they hang."""
    outlives: bool = False
    """The processes go on where the server is killed, and a run that finds some follows them."""


class LaunchedRun:
    """`jobs.records.RunHandle` of a job in processes of its own. Event loop only.

    A thread for each launch starts torchrun, reads its reports and waits for its end. torchrun dies with that thread,
    and the ranks die with torchrun.
    """

    def __init__(self, job: LaunchJob, on_event: Callable[[RunEvent], None]) -> None:
        self._job = job
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._cancelled = False
        self._paused = False
        self._step = 0
        self._snapshots: list[tuple[int, str]] = []
        self._current = self._launch()

    # -- requests to it ------------------------------------------------------------------------

    def pause(self) -> None:
        self._paused = True
        self._current.pause()

    def resume(self) -> None:
        """Launch again, from the checkpoint of the pause; where the pause has not begun, take it back."""
        self._paused = False
        if self._current.ended:
            self._current = self._launch()
        else:
            self._current.unpause()

    def cancel(self) -> None:
        self._cancelled = True
        if self._current.ended:
            self._report(CancelledEvent(step=self._step))
        else:
            self._current.kill()

    async def take_snapshot(self, step: int) -> Callable[[Path], None]:
        place = next(index for index, (known, _) in enumerate(self._snapshots) if known == step)
        return partial(_move, self._job.folder.snapshot(self._snapshots.pop(place)[1]))

    def close(self) -> None:
        self._closed = True
        self._current.kill()

    # -- its processes -------------------------------------------------------------------------

    def _launch(self) -> "_Launch":
        launch = _Launch(self, self._job)
        launch.start()
        if self._paused:
            launch.pause()
        return launch

    def post(self, event: RunEvent, snapshot: str | None) -> None:
        """Hand an event to the event loop. Any thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, event, snapshot)
        except RuntimeError:  # the loop is closed: the server ends
            self._current.kill()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def _take(self, event: RunEvent, snapshot: str | None) -> None:
        self._step = max(self._step, event.step)
        if snapshot is not None:
            self._snapshots.append((event.step, snapshot))
        self._report(event)

    def _report(self, event: RunEvent) -> None:
        if not self._closed:
            self._on_event(event)


class _Launch:
    """The processes from one start to an end or a pause, restarts included."""

    def __init__(self, run: LaunchedRun, job: LaunchJob) -> None:
        self._run, self._job, self._folder = run, job, job.folder
        self._lock = threading.Lock()
        self._process: AgentProcess | None = None
        self._killed = False
        self._pausing = False
        self._step = 0
        self._exit_code = 0
        self._stalled: str | None = None
        """Sentence about the ranks that hang, where that ended the processes."""
        self.ended = False
        """True once the last event was posted, or nothing more will be."""

    def start(self) -> None:
        threading.Thread(target=self._supervise, name="launched", daemon=True).start()

    def pause(self) -> None:
        self._pausing = True
        self._ask()

    def unpause(self) -> None:
        self._pausing = False
        remove(self._folder.path / REQUEST)

    def kill(self) -> None:
        """End all processes at once."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                kill(self._process)

    def _ask(self) -> None:
        try:
            self._folder.request(PAUSE)
        except OSError as error:
            _log.warning("cannot_pause", job=self._job.name, reason=reason(error))

    # -- on the thread -------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            last = self._work()
        except OSError as error:
            message = f"The job cannot start: {reason(error)}."
            last = (FailedEvent(step=self._step, code=error_code(error), message=message), None)
        except Exception:
            _log.exception("launched_job_failed", job=self._job.name)
            message = "An internal error ended this job; the server's log has it."
            last = (FailedEvent(step=self._step, code="internal_error", message=message), None)
        self.ended = True
        if self._run.is_cancelled:
            last = (CancelledEvent(step=self._step), None)
        if last is not None:
            self._run.post(*last)

    def _work(self) -> tuple[RunEvent, str | None] | None:
        """Wait for the devices, and run torchrun on them; returns the last event, which is not posted yet."""
        while not self._job.devices.acquire(timeout=TAIL_SECONDS):
            if self._killed:
                return None
        try:
            return self._work_on_devices()
        finally:
            self._job.devices.release()

    def _work_on_devices(self) -> tuple[RunEvent, str | None] | None:
        """Run torchrun, again where ranks were killed or hung; or follow the one that an earlier server has left."""
        left = self._left_behind()
        spec: LaunchSpec | None = None
        attempt = restarts = 0
        while not self._killed:
            best, self._stalled = self._step, None
            if left is not None:
                attempt, last = left.attempt, self._follow_left(left)
                left = None
            else:
                spec, attempt = spec or self._prepare(), attempt + 1
                self._folder.write_spec(msgspec.structs.replace(spec, attempt=attempt))
                last = self._attempt(attempt)
            if last is not None or self._killed:
                return last
            if (end := self._end()) is not None:
                _log.warning("launched_job_failed", job=self._job.name, log=self._folder.last_lines())
                return FailedEvent(step=self._step, code=end.code, message=end.message), None
            restarts = 1 if self._step > best else restarts + 1
            lines = self._folder.last_lines()
            _log.warning(
                "launched_job_crashed", job=self._job.name, restarts=restarts, stalled=self._stalled, log=lines
            )
            if restarts > self._job.max_restarts:
                return self._too_many(restarts), None
            why = self._stalled or "A process of the job was killed."
            self._run.post(RestartEvent(step=self._step, message=why), None)
        return None

    def _end(self) -> LaunchEnd | None:
        """The error that ended the processes; None where they were killed, and may be started again."""
        if self._stalled is not None:
            return None
        end = self._folder.end()
        if end is None and self._exit_code == FAILED_CODE:  # the end could not be written
            end = self._folder.first_error() or FAILED
        return None if end is None or end.crashed else end

    def _too_many(self, restarts: int) -> FailedEvent:
        limit = (
            f"{restarts} times in a row without a step in between (trainer.max_restarts is {self._job.max_restarts})"
        )
        where = f"{LOG} in the job's folder on the server has their output."
        if self._stalled is not None:
            message = f"The processes of this job hung or were killed {limit}; {where} {self._stalled}"
            return FailedEvent(step=self._step, code="ranks_stalled", message=message)
        message = f"The processes of this job were killed {limit}; {where}"
        return FailedEvent(step=self._step, code="ranks_killed", message=message)

    def _prepare(self) -> LaunchSpec:
        """Write the job for its ranks."""
        self._folder.clear()
        spec, feed = self._job.write(self._folder)
        self._folder.write(spec, feed)
        if self._pausing:
            self._ask()
        return spec

    def _left_behind(self) -> AgentRecord | None:
        """Process that an earlier server has left, to be followed. One that is not to be is killed."""
        if not self._job.outlives:
            end_left_behind(self._folder.path)
        return AgentRecord.read(self._folder.path)

    def _follow_left(self, found: AgentRecord) -> tuple[RunEvent, str | None] | None:
        """Follow what an earlier server has started, alive or not, from the newest checkpoint on."""
        process = LeftProcess(found, self._folder.path)
        with self._lock:
            self._process = process
            if self._killed:
                kill(process)
        done = newest_checkpoint(Path(self._folder.read_spec().checkpoints))
        begun = 0 if done is None else int(done.name.removeprefix(STEP))
        _log.info("launched_job_followed", job=self._job.name, process=process.pid)
        if self._pausing:
            self._ask()
        else:
            remove(self._folder.path / REQUEST)
        return self._follow(process, ReportReader(self._folder, found.attempt), begun=begun)

    def _attempt(self, attempt: int) -> tuple[RunEvent, str | None] | None:
        """One life of torchrun; returns the event that ends the run, if there was one."""
        reader = ReportReader(self._folder, attempt)
        self._folder.clear_attempt()
        with self._folder.log.open("ab") as output:
            process = self._spawn(output.fileno())
        return self._follow(process, reader)

    def _follow(
        self, process: AgentProcess, reader: ReportReader, *, begun: int | None = None
    ) -> tuple[RunEvent, str | None] | None:
        """Read reports until torchrun ends; returns the event that ends the run, if there was one. `begun`: step up to
        which an earlier server has taken in the reports."""
        last: tuple[RunEvent, str | None] | None = None
        watch = StallWatch(self._folder.path, self._job.stall_timeout)
        try:
            alive = True
            while alive and last is None and self._stalled is None:
                alive = process.poll() is None
                for report in reader.read():
                    if begun is not None and self._is_known(report, begun):
                        continue
                    if isinstance(report.event, Ended):
                        last = (report.event, report.snapshot)
                        continue
                    self._step = report.event.step
                    self._run.post(report.event, report.snapshot)
                if alive and last is None:
                    self._stalled = watch.look()
                    time.sleep(TAIL_SECONDS)
            if last is not None:
                self._step = last[0].step
                wait_for_end(process, EXIT_SECONDS)
        finally:
            kill(process)
            self._exit_code = process.wait()
            AgentRecord.forget(self._folder.path)
        return last

    def _is_known(self, report: RankReport, begun: int) -> bool:
        """True for a report that an earlier server has acted on, or that was for its own end: a pause."""
        if report.snapshot is not None and not self._folder.snapshot(report.snapshot).exists():
            return True
        if isinstance(report.event, Ended):
            return isinstance(report.event, PausedEvent) and not self._pausing
        return report.event.step <= begun

    def _spawn(self, output: int) -> subprocess.Popen[bytes]:
        job = self._job
        arguments = job.nodes.arguments(self._folder, job.name, max_restarts=job.max_restarts)
        role = "lasting-agent" if job.outlives else "agent"
        command = [sys.executable, "-m", PROGRAM, role, str(os.getpid()), str(self._folder.path)]
        failpoint("launched.spawn")
        with self._lock:
            self._process = process = subprocess.Popen(
                [*command, *arguments],
                env=dict(job.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            if self._killed:
                kill(process)
        _log.info("launched", job=job.name, process=process.pid)
        return process


def _move(source: Path, target: Path) -> None:
    """Make a snapshot's files those of an empty directory, synced. Raises `OSError`, and leaves the snapshot as it was:
    a later server may find it."""
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
    for folder, _, names in os.walk(target):
        for name in names:
            sync_file(Path(folder) / name)
    remove(source)
