"""Files between the server and the ranks, torchrun's agent, and processes that are left."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from runtime.events import CheckpointEvent, PausedEvent
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.launched.agent import PARENT, run_agent
from runtime.trainer.launched.agent_process import PROGRAM, AgentRecord, LeftProcess
from runtime.trainer.launched.files import (
    FAILED,
    FAILED_CODE,
    KILLED,
    KILLED_CODE,
    RESTARTS,
    JobFolder,
    LaunchEnd,
    RankReport,
    ReportReader,
    framed,
    newest_checkpoint,
    stating_room,
)
from runtime.trainer.launched.process import Nodes
from runtime.trainer.launched.stall import PlaceFile, StallWatch
from tests.waiting import wait_until


@pytest.mark.parametrize("rendezvous", [None, "node-0:29400"])
def test_processes_of_one_node_meet_by_a_file(rendezvous: str | None, tmp_path: Path) -> None:
    """torchrun unpickles what it finds where its agents meet."""
    arguments = Nodes(per_node=2, rendezvous=rendezvous).arguments(JobFolder(tmp_path), "job", max_restarts=0)
    place = arguments[arguments.index("--rdzv-endpoint") + 1]
    assert place == (rendezvous or str(JobFolder(tmp_path).meeting))
    assert ("store_type=file" in arguments) == (rendezvous is None)
    assert "--standalone" not in arguments


def test_reports_are_read_as_they_are_written_over_restarts(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    reader = ReportReader(folder, 3)
    assert reader.read() == []
    first, second = RankReport(CheckpointEvent(step=1, best=True), "a"), RankReport(PausedEvent(step=2))
    data = framed(first) + framed(second)
    path = folder.reports(3 * RESTARTS)
    path.write_bytes(data[:-5])
    assert reader.read() == [first]
    path.write_bytes(data)
    folder.reports(3 * RESTARTS + 1).write_bytes(framed(first))
    assert reader.read() == [second, first]


def test_the_first_error_says_how_a_job_ended(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.first_error() is None
    folder.write_end(KILLED)
    assert folder.end() == KILLED
    folder.write_error(1, LaunchEnd(crashed=False, message="first"))
    time.sleep(0.01)
    folder.write_error(0, LaunchEnd(crashed=False, message="second"))
    assert folder.first_error() == LaunchEnd(crashed=False, message="first")
    folder.meeting.write_text("stale")
    folder.clear_attempt()
    assert folder.end() is None
    assert not folder.meeting.exists()


def test_an_error_has_its_room_before_the_disk_is_full(tmp_path: Path) -> None:
    folder, end = JobFolder(tmp_path), LaunchEnd(crashed=False, message="no room", code="disk_full")
    for rank in range(2):
        folder.reserve_error(rank)
    assert folder.first_error() is None
    size = (tmp_path / "error-1.json").stat().st_size
    folder.write_error(1, end)
    assert (tmp_path / "error-1.json").stat().st_size == size
    assert folder.first_error() == end
    folder.clear_attempt()
    assert folder.first_error() is None


def test_a_failed_write_says_what_it_was(tmp_path: Path) -> None:
    said = r"^\[Errno 28\] No space left on device: a.safetensors takes 1,200,000 bytes, and [\d,]+ are free"
    with pytest.raises(OSError, match=said) as caught, stating_room(tmp_path / "a.safetensors", 1_200_000):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) not in str(caught.value.strerror)


# -- ranks that hang -----------------------------------------------------------------------------------


class WatchedRanks:
    """Two ranks' notes, and a watch that believes in a clock of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.watch = StallWatch(folder, 10.0)
        self.ranks = [PlaceFile(folder, rank) for rank in range(2)]

    def look_for(self, seconds: int) -> str | None:
        """The first sentence of a watch that looks every second."""
        for _ in range(seconds):
            self.now += 1.0
            if (found := self.watch.look()) is not None:
                return found
        return None


def test_the_rank_that_is_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedRanks(tmp_path, monkeypatch)
    for step in range(3):
        for rank in watched.ranks:
            rank.move(f"computes forward in step {step}")
            assert watched.look_for(6) is None
    watched.ranks[0].move("changes the weights")
    place = f"Rank 1 (process {os.getpid()}, which computes forward in step 2)"
    assert watched.look_for(30) == f"{place} has not moved for 10 s, and the others wait."


def test_ranks_that_are_at_the_same_place_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedRanks(tmp_path, monkeypatch)
    found = watched.look_for(30)
    assert found is not None
    assert found.startswith("No rank has moved for 10 s: rank 0 (process ")
    assert found.endswith("which starts).")


def test_a_machine_that_sleeps_is_no_rank_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedRanks(tmp_path, monkeypatch)
    for _ in range(3):
        assert watched.look_for(2) is None
        watched.now += 3600.0
        assert watched.watch.look() is None
        watched.ranks[1].move("computes forward")


def test_before_a_rank_starts_none_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun itself has a limit for nodes that do not meet."""
    now = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    watch = StallWatch(tmp_path, 10.0)
    assert [watch.look() for _ in range(100)] == [None] * 100


# -- how it ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("cannot read '/srv/models/tiny/config.json', nor /tmp/x: 1/2 of a/b"),
         "A rank of this job failed: RuntimeError: cannot read 'config.json', nor x: 1/2 of a/b"),
        (OSError("/srv/models/tiny does not appear to have a file"),
         "The job cannot go on: tiny does not appear to have a file."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/srv/models/tiny"),
         "The job cannot go on: No such file or directory."),
        (MemoryError(), "There is not enough memory for this job: lower micro_batch_size or sequence_len."),
    ],
)  # fmt: skip
def test_errors_of_ranks_name_no_path_of_the_server(error: Exception, message: str) -> None:
    from runtime.trainer.launched.agent import _end_of

    assert _end_of(error).message == message


def test_the_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for name in ("step-9", "step-10", "step-11.partial"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    """The child of a parent that is killed is killed too, whatever it does."""
    child = "import os, time, sys; from runtime.support.threads import die_with; die_with(os.getppid()); "
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        for _ in range(100):
            if not _alive(pid):
                break
            time.sleep(0.1)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")


def _left_in(folder: Path) -> subprocess.Popen[bytes]:
    """A process with the command line of a launched job's agent."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", PROGRAM, "lasting-agent", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    wait_until(lambda: psutil.Process(process.pid).cmdline() == command)  # for a moment after its start it has none
    return process


def test_a_process_that_an_earlier_server_left(tmp_path: Path) -> None:
    with _left_in(tmp_path) as process:
        started = psutil.Process(process.pid).create_time()
        left = LeftProcess(AgentRecord(pid=process.pid, started=started, attempt=1), tmp_path)
        other = LeftProcess(AgentRecord(pid=process.pid, started=started - 60, attempt=1), tmp_path)
        assert (left.poll(), other.poll(), other.wait()) == (None, 0, 0)  # an id may be given anew
        with pytest.raises(subprocess.TimeoutExpired):
            left.wait(0.01)
        left.kill()
        assert left.wait(10) == 0  # though its parent has not asked for its end yet
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("same", ["folder and start", "start", "folder"])
def test_only_the_noted_process_is_ended(same: str, tmp_path: Path) -> None:
    """An id that another process has by now is left alone, whatever else it has of the noted one."""
    folder = JobDirectories(tmp_path).launched("job")
    folder.mkdir(parents=True)
    with _left_in(folder if "folder" in same else tmp_path / "other") as process:
        started = psutil.Process(process.pid).create_time() - (0 if "start" in same else 60)
        AgentRecord(pid=process.pid, started=started, attempt=1).write(folder)
        assert JobDirectories(tmp_path).with_left_processes() == ["job"]
        assert JobDirectories(tmp_path).delete(["jobs/job/launched"]) == ["jobs/job/launched"]
        if same == "folder and start":
            assert process.wait(10) == -signal.SIGKILL
        else:
            assert process.poll() is None
            process.kill()
    assert JobDirectories(tmp_path).with_left_processes() == []


@pytest.mark.parametrize("code", [-signal.SIGKILL, FAILED_CODE])
@pytest.mark.parametrize("noted", [True, False])
def test_how_torchrun_ended(code: int, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was killed is tried again; one that raised is not, though it could not write that down."""
    from types import SimpleNamespace

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    folder, end = JobFolder(tmp_path), LaunchEnd(crashed=False, message="no room", code="disk_full")

    def fail(arguments: list[str]) -> None:
        if noted:
            folder.write_error(0, end)
        raise ChildFailedError("rank", {0: SimpleNamespace(exitcode=code)})  # type: ignore[dict-item]

    monkeypatch.setenv(PARENT, "")  # to have it as it was
    monkeypatch.setattr(ChildFailedError, "__init__", lambda self, name, failures: setattr(self, "failures", failures))
    monkeypatch.setattr(run, "main", fail)
    assert run_agent(0, [], folder) == (KILLED_CODE if code < 0 else FAILED_CODE)
    assert folder.end() == (KILLED if code < 0 else end if noted else FAILED)


def test_another_program_at_the_meeting_place(tmp_path: Path) -> None:
    """It takes the connection and says nothing, for which torchrun waits without end."""
    folder = JobFolder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = Nodes(per_node=1, count=2, rendezvous=place).arguments(folder, "job", max_restarts=0)
        program = "import sys; from runtime.trainer.launched import agent; agent.MEETING_SECONDS = 1.0; "
        program += "sys.exit(agent.main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "agent", "0", str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == FAILED_CODE
    found = folder.end()
    assert found is not None
    assert (found.crashed, found.code) == (False, "nodes_not_met")


def test_torchrun_itself_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run

    def fail(arguments: list[str]) -> None:
        raise ConnectionError("The connection to the C10d store has failed.")

    monkeypatch.setenv(PARENT, "")
    monkeypatch.setattr(run, "main", fail)
    folder = JobFolder(tmp_path)
    assert run_agent(0, [], folder) == FAILED_CODE
    found = folder.end()
    assert found is not None
    assert not found.crashed
    assert "C10d store has failed" in found.message
