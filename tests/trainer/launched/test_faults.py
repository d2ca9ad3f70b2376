"""Launched jobs whose disk is full, whose ranks hang, or whose server ends before they are cancelled."""

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.support.database import FILE
from tests.end_to_end.process import ServerProcess
from tests.tiny import make_tiny_llama
from tests.trainer.launched.jobs import LORA, RECIPE, ROWS, agents_of, ranks_of
from tests.waiting import wait_until

DATA = {"rows.jsonl": ROWS}
TWO = ["cpu", "cpu"]
MIB = 2**20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny"))


def messages(server: ServerProcess, job: str) -> list[str]:
    found = server.http.get(f"/admin/jobs/{job}/events", params={"limit": 1000}).json()["data"]
    return [event["message"] for event in found]


# -- a full disk -------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes. Skips where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def filled(disk: Path, left: int) -> Iterator[None]:
    """Context in which a disk has no more than `left` bytes free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        while (more := shutil.disk_usage(disk).free - left) > 0:
            file.write(bytes(min(more, MIB)))
            file.flush()
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def limited(processes: list[int], size: int) -> Iterator[None]:
    """The same for processes, whose files may not grow beyond `size` bytes."""
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [pytest.param("file system", marks=pytest.mark.slow), "file size"])
def test_a_full_disk_ends_a_job_that_goes_on_once_there_is_room(kind: str, tiny: str, tmp_path: Path) -> None:
    """The last checkpoint stays, the reason names file and bytes, and the server answers all the while."""
    recipe = RECIPE + "ddp: true\nsave_steps: 2\nmax_steps: 6\n"
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk", 48 * MIB)) if kind == "file system" else tmp_path
        state = disk / "state"
        server = stack.enter_context(ServerProcess(tiny, state, failpoints="launched.step=sleep:0.5", devices=TWO))
        job = server.train(recipe, DATA)
        wait_until(lambda: 3 in server.losses(job), 180)
        first = state / "jobs" / job / "checkpoints" / "step-2"
        before = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
        full = filled(disk, 96 * 1024) if kind == "file system" else limited(ranks_of(state), 96 * 1024)
        with full:
            ended = server.wait_for_job(job, 120)
            server.ask("tiny", "Why is the sky blue?")
            wait_until(lambda: not ranks_of(state) and not agents_of(state), 20)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "disk_full")
        text = ended["error"]["message"]
        assert f"cannot write the checkpoint of step 4 to jobs/{job}/launched/snapshots/" in text
        assert "parameters.safetensors takes " in text
        assert " bytes, and " in text
        assert str(tmp_path) not in text
        assert {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()} == before
        assert server.http.post(f"/admin/jobs/{job}/resume").status_code == 200
        resumed = server.wait_for_job(job, 120)
        assert (resumed["status"], resumed["error"]) == ("succeeded", None)
        assert "Resumed: queued, to go on from the checkpoint of step 2." in messages(server, job)
        losses = server.losses(job)
        assert sorted(losses) == list(range(1, 7))
        whole = server.train(recipe.replace("words", "whole"), DATA)
        assert server.wait_for_job(whole)["status"] == "succeeded"
        assert losses == pytest.approx(server.losses(whole), abs=1e-3)


# -- ranks that hang -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_hangs_is_named_and_its_job_started_again(tiny: str, tmp_path: Path) -> None:
    """Once it is stopped by a signal, and then twice at the same place in a step, between the others' collectives."""
    state = tmp_path / "state"
    hang = "launched.step=sleep:0.5;launched.backward@1-6=sleep:900"
    settings: dict[str, Any] = {"devices": TWO, "max_restarts": 1, "stall_timeout": 60}
    with ServerProcess(tiny, state, failpoints=hang, **settings) as server:
        job = server.train(LORA + "ddp: true\nsave_steps: 2\n", DATA)
        wait_until(lambda: 3 in server.losses(job), 180)
        stopped = next(pid for pid in ranks_of(state) if _rank_of(pid) == 1)
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: any("stopped by a signal" in text for text in messages(server, job)), 180)
        (text,) = [text for text in messages(server, job) if "stopped by a signal" in text]
        assert text.startswith(f"Rank 1 (process {stopped}, which ")
        server.ask("tiny", "Why is the sky blue?")
        wait_until(lambda: not Path(f"/proc/{stopped}").exists(), 20)
        ended = server.wait_for_job(job, 480)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "ranks_stalled")
        assert "trainer.max_restarts is 1" in ended["error"]["message"]
        assert "which computes backward in step 6) has not moved for" in ended["error"]["message"]
        assert " Rank 1 (process " in ended["error"]["message"]
        wait_until(lambda: not ranks_of(state) and not agents_of(state), 20)
        server.ask("tiny", "Why is the sky blue?")


def _rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(one.partition(b"=")[2]) for one in variables if one.startswith(b"RANK="))


# -- processes that nothing follows --------------------------------------------------------------------


def kill_left(state: Path) -> None:
    """End what a test that failed has left."""
    for pid in (*agents_of(state), *ranks_of(state)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", ["cancel", "pause", "no longer followed"])
def test_processes_of_a_job_that_does_not_go_on_end(
    action: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """They outlive a server, which has stored a request that it did nothing of yet; or whose next start is to follow no
    processes."""
    monkeypatch.setenv("EFT_TRAINER_OUTLIVE_SERVER", "true")
    state = tmp_path / "state"
    request.addfinalizer(lambda: kill_left(state))
    with ServerProcess(tiny, state, failpoints="launched.step=sleep:600", devices=TWO) as server:
        job = server.train(LORA + "ddp: true\n", DATA)
        wait_until(lambda: len(ranks_of(state)) == 2, 180)
        server.kill()
    assert len(ranks_of(state)) == 2
    if action == "no longer followed":
        monkeypatch.setenv("EFT_TRAINER_OUTLIVE_SERVER", "false")
    else:
        with contextlib.closing(sqlite3.connect(state / FILE)) as connection, connection:
            connection.execute("UPDATE jobs SET wanted = ? WHERE id = ?", (action, job))
    before = {*ranks_of(state), *agents_of(state)}
    with ServerProcess(tiny, state, devices=TWO) as server:
        wait_until(lambda: not before & {*ranks_of(state), *agents_of(state)}, 20)
        if action != "no longer followed":
            assert server.job(job)["status"] == {"cancel": "cancelled", "pause": "paused"}[action]
            assert ranks_of(state) == agents_of(state) == []
