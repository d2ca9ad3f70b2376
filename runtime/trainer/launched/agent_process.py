"""torchrun's agent as a process: a child of this server, or one that an earlier server has left.

The one that runs is noted in the job's folder. Nothing here imports torch.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from runtime.support.durable import remove, replace_file
from runtime.support.logs import get_logger

POLL_SECONDS = 0.1
"""Time between looks at a process that is no child."""
PROGRAM = "runtime.trainer.launched"
AGENT_FILE = "agent.json"
CLOCK_SECONDS = 2.0
"""Difference up to which two starts are the same: psutil works the time out from that of the machine's start, which
moves with the clock."""

_log = get_logger("launched")


class AgentRecord(Struct, frozen=True, kw_only=True):
    """The process that is torchrun, while it runs."""

    pid: int
    started: float
    """Its start in seconds since the epoch, which tells it from a later process of the same id."""
    attempt: int
    """`LaunchSpec.attempt`"""

    @staticmethod
    def read(folder: Path) -> "AgentRecord | None":
        """The process that was noted last, and whose end no server has seen."""
        try:
            return msgspec.json.decode((folder / AGENT_FILE).read_bytes(), type=AgentRecord)
        except (OSError, msgspec.MsgspecError):
            return None

    def write(self, folder: Path) -> None:
        """Note the process that runs. Raises `OSError`."""
        replace_file(folder / AGENT_FILE, msgspec.json.encode(self))

    @staticmethod
    def forget(folder: Path) -> None:
        remove(folder / AGENT_FILE)


class LeftProcess:
    """An agent that an earlier server has started, which is no child of this process: what is used of `Popen`."""

    def __init__(self, agent: AgentRecord, folder: Path) -> None:
        """`folder`: of its job, which its command line names."""
        self.pid = agent.pid
        self._started = agent.started
        self._folder = str(folder)

    def poll(self) -> int | None:
        """None while it runs; else 0, for an exit code that is not known."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self._started) < CLOCK_SECONDS
            if not same or found.status() == psutil.STATUS_ZOMBIE:
                return 0
            words = found.cmdline()
        except psutil.Error:
            return 0
        return None if PROGRAM in words and self._folder in words else 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


AgentProcess = subprocess.Popen[bytes] | LeftProcess


def kill(process: AgentProcess) -> None:
    """Kill torchrun, and with it its ranks."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()


def wait_for_end(process: AgentProcess, seconds: float) -> None:
    """Wait for the end of torchrun, and log where it does not come."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        _log.warning("launched_job_does_not_end", process=process.pid)


def end_left_behind(folder: Path) -> None:
    """Kill the processes that an earlier server has left for the job of this folder, and that are not to go on.
    Blocks."""
    if (found := AgentRecord.read(folder)) is None:
        return
    process = LeftProcess(found, folder)
    if process.poll() is None:
        kill(process)
        _log.info("left_processes_ended", process=found.pid, job=folder.parent.name)
    AgentRecord.forget(folder)
