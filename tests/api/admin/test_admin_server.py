"""Training jobs in a whole server: forms over a real socket, and what stopping does to a running job."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.support.database import StateDirectoryInUse
from settings.schema import Settings
from tests.api.conftest import RunningServer, jobs_of, tiny_settings
from tests.trainer.jobs.fakes import World


def head(server: RunningServer, path: str, *headers: str) -> bytes:
    host = f"Host: {server.url.removeprefix('http://')}"
    lines = [f"POST {path} HTTP/1.1", host, "Content-Type: multipart/form-data; boundary=X", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def part(disposition: str, content: bytes) -> bytes:
    return f"--X\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"


def wait_for(url: str, job_id: str, status: str) -> dict[str, Any]:
    for _ in range(500):
        job: dict[str, Any] = httpx.get(f"{url}/admin/jobs/{job_id}").json()
        if job["status"] == status:
            return job
        time.sleep(0.01)
    raise AssertionError(f"{job['status']}, never {status}")


def folders(server: RunningServer) -> int:
    return len(httpx.get(f"{server.url}/admin/jobs?limit=100").json()["data"])


def test_a_form_in_small_pieces(server: RunningServer) -> None:
    data = b"\r\n--\r\n-X\r" * 100  # nearly a boundary, again and again
    body = part('name="recipe"', b"name: pieces") + part('name="f"; filename="a b.jsonl"', data) + b"--X--\r\n"
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head(server, "/admin/train", f"Content-Length: {len(body)}", "Connection: close"))
        for start in range(0, len(body), 7):
            connection.sendall(body[start : start + 7])
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 201")
    job = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert job["files"] == [{"name": "a b.jsonl", "bytes": len(data)}]
    assert job["summary"]["rows"] == 200
    assert wait_for(server.url, job["id"], "succeeded")["adapter"].startswith("pieces@")


def test_a_stalled_form_is_answered(server: RunningServer) -> None:
    before = folders(server)
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(
            head(server, "/admin/train", "Content-Length: 1000") + part('name="f"; filename="a"', b"1")[:60]
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
    assert folders(server) == before


def test_a_client_that_leaves_in_the_middle_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    with RunningServer(tiny_settings(tiny_model), jobs_of(world)) as server:
        root = world.manager.directories.root
        with socket.create_connection(server.address, timeout=10) as connection:
            sent = part('name="recipe"', b"name: a") + part('name="f"; filename="a"', b"1" * 3_000_000)
            connection.sendall(head(server, "/admin/train", "Content-Length: 9000000") + sent)
            for _ in range(500):
                if any(root.iterdir()):
                    break
                time.sleep(0.01)
            assert any(root.iterdir())
        for _ in range(500):
            if not any(root.iterdir()):
                break
            time.sleep(0.01)
        assert not any(root.iterdir())
        assert httpx.get(f"{server.url}/admin/jobs").json()["data"] == []


def test_stopping_writes_a_checkpoint_and_the_next_server_goes_on_from_it(tiny_model: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    with RunningServer(tiny_settings(tiny_model), jobs_of(world)) as server:
        recipe = b"name: a\nsteps: 100000\n"
        job_id = httpx.post(f"{server.url}/admin/train", content=recipe, headers={"content-type": "text/yaml"}).json()[
            "id"
        ]
        wait_for(server.url, job_id, "running")
        while httpx.get(f"{server.url}/admin/jobs/{job_id}").json()["step"] < 3:
            time.sleep(0.01)
        server.stop()
        assert server.join() == 0
    with RunningServer(tiny_settings(tiny_model), jobs_of(world)) as server:
        job = wait_for(server.url, job_id, "running")
        (checkpoint,) = job["checkpoints"]
        assert checkpoint["step"] >= 3
        assert world.runs.started == [(job_id, checkpoint["step"])]
        httpx.post(f"{server.url}/admin/jobs/{job_id}/cancel")
        wait_for(server.url, job_id, "cancelled")


def test_serving_goes_on_where_the_state_cannot_be_had(tiny_model: Path) -> None:
    def open_state(service: object, settings: Settings) -> Any:
        raise StateDirectoryInUse("/var/lib/eft is in use")

    with RunningServer(tiny_settings(tiny_model), open_state) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
        assert answer.status_code == 200
        error = httpx.get(f"{server.url}/admin/jobs").json()["error"]
        assert error["code"] == "training_unavailable"
        assert "/var/lib" not in error["message"]


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "application/yaml"])
def test_as_curl_sends_it(server: RunningServer, content_type: str) -> None:
    name = content_type.partition("/")[2]
    answer = httpx.post(
        f"{server.url}/admin/train", content=f"name: {name}\n".encode(), headers={"content-type": content_type}
    )
    assert answer.status_code == 201
    wait_for(server.url, answer.json()["id"], "succeeded")
