"""A launched job as the server sees it: torchrun as a child, its reports as events, restarts where a rank is killed."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from runtime.events import CancelledEvent, FailedEvent, FinishedEvent, PausedEvent, RunEvent
from runtime.support.durable import error_code, reason, remove, sync_file
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.trainer.launched.files import (
    FAILED,
    FAILED_CODE,
    LOG,
    PAUSE,
    REQUEST,
    STEP,
    AgentRecord,
    JobFolder,
    LaunchSpec,
    RankReport,
    ReportReader,
    newest_checkpoint,
)
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
        return [*shared, "-m", "runtime.trainer.launched", "rank", str(folder.path)]


class LaunchedRun:
    """`jobs.records.RunHandle` of a job in processes of its own. Event loop only.

    A thread for each launch starts torchrun, reads its reports and waits for its end. torchrun dies with that thread,
    and the ranks die with torchrun.
    """

    def __init__(
        self,
        folder: JobFolder,
        name: str,
        write: Callable[[JobFolder], tuple[LaunchSpec, ExampleFeed]],
        nodes: Nodes,
        environment: Mapping[str, str],
        on_event: Callable[[RunEvent], None],
        *,
        max_restarts: int,
        devices: threading.Lock,
        outlives: bool = False,
    ) -> None:
        """`write` makes the job for the ranks, and may write into its folder; it blocks, and runs on the thread.
        `max_restarts`: how often the job is started again after a rank was killed, without a step in between.
        `devices`: held by the run whose processes have the devices; others wait for it. `outlives`: the processes go on
        where the server is killed, and a run that finds some follows them."""
        self._folder, self._name, self._write, self._nodes = folder, name, write, nodes
        self._environment = dict(environment)
        self._on_event = on_event
        self._max_restarts = max_restarts
        self._devices = devices
        self._outlives = outlives
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
        return partial(_move, self._folder.snapshot(self._snapshots.pop(place)[1]))

    def close(self) -> None:
        self._closed = True
        self._current.kill()

    # -- its processes -------------------------------------------------------------------------

    def _launch(self) -> "_Launch":
        launch = _Launch(
            self,
            self._folder,
            self._name,
            self._write,
            self._nodes,
            self._environment,
            self._devices,
            outlives=self._outlives,
        )
        launch.start(self._max_restarts)
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

    def __init__(
        self,
        run: LaunchedRun,
        folder: JobFolder,
        name: str,
        write: Callable[[JobFolder], tuple[LaunchSpec, ExampleFeed]],
        nodes: Nodes,
        environment: dict[str, str],
        devices: threading.Lock,
        *,
        outlives: bool,
    ) -> None:
        self._devices, self._outlives = devices, outlives
        self._run, self._folder, self._name, self._write, self._nodes = run, folder, name, write, nodes
        self._environment = environment
        self._lock = threading.Lock()
        self._process: AgentProcess | None = None
        self._killed = False
        self._pausing = False
        self._step = 0
        self._exit_code = 0
        self.ended = False
        """True once the last event was posted, or nothing more will be."""

    def start(self, max_restarts: int) -> None:
        threading.Thread(target=self._supervise, args=(max_restarts,), name="launched", daemon=True).start()

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
                _kill(self._process)

    def _ask(self) -> None:
        try:
            self._folder.request(PAUSE)
        except OSError as error:
            _log.warning("cannot_pause", job=self._name, reason=reason(error))

    # -- on the thread -------------------------------------------------------------------------

    def _supervise(self, max_restarts: int) -> None:
        try:
            last = self._work(max_restarts)
        except OSError as error:
            message = f"The job cannot start: {reason(error)}."
            last = (FailedEvent(step=self._step, code=error_code(error), message=message), None)
        except Exception:
            _log.exception("launched_job_failed", job=self._name)
            message = "An internal error ended this job; the server's log has it."
            last = (FailedEvent(step=self._step, code="internal_error", message=message), None)
        self.ended = True
        if self._run.is_cancelled:
            last = (CancelledEvent(step=self._step), None)
        if last is not None:
            self._run.post(*last)

    def _work(self, max_restarts: int) -> tuple[RunEvent, str | None] | None:
        """Wait for the devices, and run torchrun on them; returns the last event, which is not posted yet."""
        while not self._devices.acquire(timeout=TAIL_SECONDS):
            if self._killed:
                return None
        try:
            return self._work_on_devices(max_restarts)
        finally:
            self._devices.release()

    def _work_on_devices(self, max_restarts: int) -> tuple[RunEvent, str | None] | None:
        """Run torchrun, again where ranks were killed; or follow the one that an earlier server has left."""
        left = self._left_behind()
        spec: LaunchSpec | None = None
        attempt = restarts = 0
        while not self._killed:
            best = self._step
            if left is not None:
                attempt, last = left.attempt, self._follow_left(left)
                left = None
            else:
                spec, attempt = spec or self._prepare(), attempt + 1
                self._folder.write_spec(msgspec.structs.replace(spec, attempt=attempt))
                last = self._attempt(attempt, max_restarts)
            if last is not None or self._killed:
                return last
            end = self._folder.end() or (FAILED if self._exit_code == FAILED_CODE else None)
            if end is not None and not end.crashed:
                _log.warning("launched_job_failed", job=self._name, log=self._folder.last_lines())
                return FailedEvent(step=self._step, code=end.code, message=end.message), None
            restarts = 1 if self._step > best else restarts + 1
            _log.warning("launched_job_crashed", job=self._name, restarts=restarts, log=self._folder.last_lines())
            if restarts > max_restarts:
                message = (
                    f"The processes of this job were killed {restarts} times in a row without a step in between "
                    f"(trainer.max_restarts is {max_restarts}); {LOG} in the job's folder on the server has their "
                    "output."
                )
                return FailedEvent(step=self._step, code="ranks_killed", message=message), None
        return None

    def _prepare(self) -> LaunchSpec:
        """Write the job for its ranks."""
        self._folder.clear()
        spec, feed = self._write(self._folder)
        self._folder.write(spec, feed)
        if self._pausing:
            self._ask()
        return spec

    def _left_behind(self) -> AgentRecord | None:
        """Process that an earlier server has left, to be followed. One that is not to be is killed."""
        found = self._folder.agent()
        if found is not None and not self._outlives:
            _kill(LeftProcess(found))
            self._folder.forget_agent()
            return None
        return found

    def _follow_left(self, found: AgentRecord) -> tuple[RunEvent, str | None] | None:
        """Follow what an earlier server has started, alive or not, from the newest checkpoint on."""
        process = LeftProcess(found)
        with self._lock:
            self._process = process
            if self._killed:
                _kill(process)
        done = newest_checkpoint(Path(self._folder.read_spec().checkpoints))
        begun = 0 if done is None else int(done.name.removeprefix(STEP))
        _log.info("launched_job_followed", job=self._name, process=process.pid)
        if self._pausing:
            self._ask()
        else:
            remove(self._folder.path / REQUEST)
        return self._follow(process, ReportReader(self._folder, found.attempt), begun=begun)

    def _attempt(self, attempt: int, max_restarts: int) -> tuple[RunEvent, str | None] | None:
        """One life of torchrun; returns the event that ends the run, if there was one."""
        reader = ReportReader(self._folder, attempt)
        self._folder.clear_meeting()
        with self._folder.log.open("ab") as output:
            process = self._spawn(max_restarts, output.fileno())
        return self._follow(process, reader)

    def _follow(
        self, process: "AgentProcess", reader: ReportReader, *, begun: int | None = None
    ) -> tuple[RunEvent, str | None] | None:
        """Read reports until torchrun ends; returns the event that ends the run, if there was one. `begun`: step up to
        which an earlier server has taken in the reports."""
        last: tuple[RunEvent, str | None] | None = None
        try:
            alive = True
            while alive and last is None:
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
                    time.sleep(TAIL_SECONDS)
            if last is not None:
                self._step = last[0].step
                _wait(process, EXIT_SECONDS)
        finally:
            _kill(process)
            self._exit_code = process.wait()
            self._folder.forget_agent()
        return last

    def _is_known(self, report: RankReport, begun: int) -> bool:
        """True for a report that an earlier server has acted on, or that was for its own end: a pause."""
        if report.snapshot is not None and not self._folder.snapshot(report.snapshot).exists():
            return True
        if isinstance(report.event, Ended):
            return isinstance(report.event, PausedEvent) and not self._pausing
        return report.event.step <= begun

    def _spawn(self, max_restarts: int, output: int) -> subprocess.Popen[bytes]:
        arguments = self._nodes.arguments(self._folder, self._name, max_restarts=max_restarts)
        role = "lasting-agent" if self._outlives else "agent"
        command = [sys.executable, "-m", "runtime.trainer.launched", role, str(os.getpid()), str(self._folder.path)]
        failpoint("launched.spawn")
        with self._lock:
            self._process = process = subprocess.Popen(
                [*command, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            if self._killed:
                _kill(process)
        _log.info("launched", job=self._name, process=process.pid)
        return process


class LeftProcess:
    """torchrun as an earlier server has started it, which is no child of this process: what is used of `Popen`."""

    def __init__(self, agent: AgentRecord) -> None:
        self.pid = agent.pid
        self._started = agent.started

    def poll(self) -> int | None:
        """None while it runs; else 0, for an exit code that is not known."""
        try:
            found = psutil.Process(self.pid)
            # psutil works the time out from that of the machine's start, which moves with the clock.
            same = abs(found.create_time() - self._started) < 2.0 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return 0
        return None if same else 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
            time.sleep(TAIL_SECONDS)
        return 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


AgentProcess = subprocess.Popen[bytes] | LeftProcess


def _kill(process: AgentProcess) -> None:
    """Kill torchrun, and with it its ranks."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()


def _wait(process: AgentProcess, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        _log.warning("launched_job_does_not_end", process=process.pid)


def _move(source: Path, target: Path) -> None:
    """Make a snapshot's files those of an empty directory, synced. Raises `OSError`, and leaves the snapshot as it was:
    a later server may find it."""
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
    for folder, _, names in os.walk(target):
        for name in names:
            sync_file(Path(folder) / name)
    remove(source)
