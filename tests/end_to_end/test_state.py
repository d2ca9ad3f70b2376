"""Real servers over a state directory that is full, damaged or half lost: they serve what was published, and say so."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.support.database import FILE
from tests.adapter_files import make_adapter
from tests.end_to_end.process import ROOT, ServerProcess
from tests.jobs import NEWT_ROWS, newt_recipe
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)


def recipe(*, rank: int, steps: int, save: int) -> str:
    return newt_recipe(name="trained", lora_r=rank, max_steps=steps, save_steps=save, loss_watchdog_threshold=100)


def check_point(state: Path) -> None:
    """Have everything in the file itself, as after an orderly end."""
    connection = sqlite3.connect(state / FILE)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


LINES = b"".join(
    b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2}}\n' % n
    for n in range(5)
)


def run_batch(server: ServerProcess) -> None:
    file = server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", LINES)}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = server.http.post("/v1/batches", json=asked).json()
    wait_until(lambda: server.http.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed", 60)


def check_batch(server: ServerProcess) -> None:
    """What `run_batch` has made is there."""
    (batch,) = server.http.get("/v1/batches").json()["data"]
    assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert server.http.get(f"/v1/files/{batch['input_file_id']}/content").content == LINES
    answers = server.http.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    assert sorted(json.loads(answer)["custom_id"] for answer in answers) == ["0", "1", "2", "3", "4"]


@pytest.fixture(scope="module")
def filled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a server that trained an adapter and loaded another, and was killed. Not to be changed."""
    folder = tmp_path_factory.mktemp("filled")
    make_adapter(tiny_model, folder / "made", target_modules=["q_proj"])
    with ServerProcess(str(tiny_model), folder / "state", data_roots=folder) as server:
        job = server.wait_for_job(server.train(recipe(rank=4, steps=4, save=2), {"train.jsonl": NEWT_ROWS}))
        assert job["status"] == "succeeded", job
        body = {"lora_name": "loaded", "lora_path": str(folder / "made")}
        assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert server.http.post("/admin/adapters/loaded/alias", json={"alias": "other"}).status_code == 200
        run_batch(server)
        server.kill()
    return folder / "state"


@pytest.fixture
def state(filled: Path, tmp_path: Path) -> Path:
    done = subprocess.run(["cp", "-a", str(filled), str(tmp_path / "state")], check=True)
    assert done.returncode == 0
    return tmp_path / "state"


def files_below(folder: Path) -> dict[str, bytes]:
    """But for SQLite's index of its WAL and the running server's token: neither is kept."""
    ignored = {f"{FILE}-shm", "admin-token"}
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in ignored)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@contextmanager
def serving_read_only(model: Path, state: Path, why: str, log: Path, **limits: int) -> Iterator[ServerProcess]:
    """A server that serves what was published, changes nothing, and says why in its log and at /admin."""
    before = files_below(state)
    with ServerProcess(str(model), state, log=log, **limits) as server:
        for name in ("trained", "loaded@1", "other"):
            body = {"model": name, "prompt": "The newt", "max_tokens": 2}
            answer = server.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
        assert server.http.get("/ready").status_code == 200
        for method, path in (
            ("GET", "/admin/jobs"),
            ("POST", "/admin/train"),
            ("GET", "/admin/adapters"),
            ("DELETE", "/admin/adapters/loaded"),
            ("POST", "/v1/load_lora_adapter"),
            ("GET", "/v1/files"),
            ("GET", "/v1/batches"),
        ):
            answer = server.http.request(method, path)
            assert answer.status_code == 503, (path, answer.text)
            assert why in answer.json()["error"]["message"], path
            assert str(state) not in answer.text
        after = files_below(state)
        assert {name: after.get(name) for name in before} == before
        assert "state_not_usable" in log.read_text()
        yield server


def rebuild(state: Path) -> str:
    command = [sys.executable, "-m", "runtime", "state", "rebuild", "--state-dir", str(state)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("lost", ["all of it", "the WAL"])
def test_a_lost_database_is_said_loudly_and_rebuilt(tiny_model: Path, state: Path, tmp_path: Path, lost: str) -> None:
    """Also where a backup was made of the file alone, and all that was stored was in its WAL still."""
    for path in state.glob(f"{FILE}*" if lost == "all of it" else f"{FILE}-*"):
        path.unlink()
    with serving_read_only(tiny_model, state, "eft state rebuild", tmp_path / "log"):
        # Beside the server, which changes nothing.
        assert "Jobs: 1. Versions of adapters: 2. Files: 1. Batches: 1." in rebuild(state)
    with ServerProcess(str(tiny_model), state) as server:
        names = {model["id"] for model in server.http.get("/v1/models").json()["data"]}
        assert {"trained", "loaded"} <= names
        (job,) = server.http.get("/admin/jobs").json()["data"]
        assert (job["status"], job["adapter"], job["step"]) == ("succeeded", "trained@1", 4)
        assert len(server.losses(job["id"])) == 4
        assert server.http.get("/admin/adapters/loaded").json()["aliases"] == ["other"]
        assert server.http.delete(f"/admin/jobs/{job['id']}").status_code == 200
        assert server.ask("trained", "a", 2) is not None
        check_batch(server)
        assert not (state / "lost+found").exists()


def test_a_lost_database_beside_files_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is moved or deleted until it is decided what to do."""
    state = tmp_path / "state"
    with ServerProcess(str(tiny_model), state) as server:
        run_batch(server)
    for path in state.glob(f"{FILE}*"):
        path.unlink()
    before = files_below(state)
    with ServerProcess(str(tiny_model), state) as server:
        answer = server.http.get("/v1/files")
        assert answer.status_code == 503
        assert "folders of 1 files, 1 batches" in answer.json()["error"]["message"]
    assert files_below(state) == before
    rebuild(state)
    with ServerProcess(str(tiny_model), state) as server:
        check_batch(server)


def test_a_damaged_database(tiny_model: Path, state: Path, tmp_path: Path) -> None:
    check_point(state)
    data = bytearray((state / FILE).read_bytes())
    data[4096:12288] = bytes(8192)
    (state / FILE).write_bytes(data)
    with serving_read_only(tiny_model, state, "is damaged", tmp_path / "log"):
        pass


def test_a_full_disk_at_the_start(tiny_model: Path, state: Path, tmp_path: Path) -> None:
    with serving_read_only(tiny_model, state, "could not be written", tmp_path / "log", file_size=2048):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount")
def test_a_read_only_disk_at_the_start(tiny_model: Path, state: Path, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "--bind", state, state], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no mounts here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", state], check=True)
        with serving_read_only(tiny_model, state, "could not be written", tmp_path / "log"):
            pass
    finally:
        subprocess.run(["umount", state], check=True)


def test_a_disk_that_is_full_while_a_job_runs(tiny_model: Path, tmp_path: Path) -> None:
    """Its checkpoint is too large, the database is not: the job says so, and the server goes on."""
    with ServerProcess(str(tiny_model), tmp_path / "state", file_size=1_000_000) as server:
        base = server.http.get("/v1/models").json()["data"][0]["id"]
        before = server.tokens(base, "Hi", 4)
        job = server.wait_for_job(server.train(recipe(rank=64, steps=6, save=2), {"train.jsonl": NEWT_ROWS}))
        assert (job["status"], job["error"]["code"]) == ("failed", "disk_full")
        assert job["error"]["message"] == "Cannot write the checkpoint of step 2: File too large."
        small = server.wait_for_job(server.train(recipe(rank=1, steps=2, save=2), {"train.jsonl": NEWT_ROWS}))
        assert small["status"] == "succeeded", small["error"]
        assert server.tokens(base, "Hi", 4) == before


def test_a_slow_disk_does_not_fill_the_memory(tiny_model: Path, tmp_path: Path) -> None:
    """A checkpoint each step, and a disk that takes longer: the run waits."""
    slow = "snapshot.write=sleep:0.5"
    with ServerProcess(str(tiny_model), tmp_path / "state", failpoints=slow) as server:
        job_id = server.train(recipe(rank=16, steps=3000, save=1), {"train.jsonl": NEWT_ROWS})
        wait_until(lambda: len(server.job(job_id)["checkpoints"]) >= 3, 60)
        job = server.job(job_id)
        assert job["step"] - max(checkpoint["step"] for checkpoint in job["checkpoints"]) <= 3
        assert server.http.post(f"/admin/jobs/{job_id}/cancel").status_code == 200
        assert server.wait_for_job(job_id, 30)["status"] == "cancelled"


def test_what_is_kept_is_for_this_user_alone(filled: Path) -> None:
    for path in [filled, *filled.rglob("*")]:
        assert not path.stat().st_mode & 0o077, path
    (record,) = filled.glob("jobs/*/job.json")
    assert json.loads(record.read_text())["job"]["state"] == "succeeded"
