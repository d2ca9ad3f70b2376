"""What schemathesis makes up from our OpenAPI schema, valid and invalid, gets the answers that it promises."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import RunningServer

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "unsupported_method,negative_data_rejection"
)


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_every_route_positive_and_negative(server: RunningServer, tmp_path: Path, examples: int) -> None:
    beside = Path(sys.executable).with_name("st")
    command = str(beside) if beside.exists() else shutil.which("st")
    assert command is not None, "schemathesis is installed without its command"
    # A job that has run, a file, a stored chat and a response: their ids are found in the lists, and their routes then
    # answer more than 404.
    form = {"recipe": ("recipe.yml", b"name: yaml\nsteps: 3\n"), "file": ("rows.jsonl", b"{}\n")}
    assert httpx.post(f"{server.url}/admin/train", files=form).status_code in (201, 202)
    sent = {"file": ("rows.jsonl", b"{}\n")}
    assert httpx.post(f"{server.url}/v1/files", files=sent, data={"purpose": "batch"}).status_code == 200
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "store": True}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 200
    response = {"input": "Hi", "max_output_tokens": 1}
    assert httpx.post(f"{server.url}/v1/responses", json=response).status_code == 200
    limits = ["--max-examples", str(examples), "--workers", "1", "--generation-deterministic", "--seed", "1"]
    # A server that drains answers 503, as it was told to.
    limits += ["--exclude-path", "/admin/drain"]
    done = subprocess.run(
        [command, "run", f"{server.url}/docs/openapi.json", "--checks", CHECKS, *limits],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # it leaves its reports where it runs
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:]


def test_every_body_and_every_page_is_described(server: RunningServer) -> None:
    """So that the run above makes them up, and clients can be generated."""
    paths = httpx.get(f"{server.url}/docs/openapi.json").json()["paths"]
    bodies = {path for path, operations in paths.items() if "requestBody" in operations.get("post", {})}
    bodiless = {path for path, operations in paths.items() if "post" in operations} - bodies
    commands = ("/cancel", "/pause", "/resume", "/load", "/unload", "/rollback", "/cache/reset", "/drain", "/ping")
    assert all(path.endswith(commands) for path in bodiless), bodiless
    for path in ("/v1/files", "/admin/train", "/admin/adapters/upload"):
        assert list(paths[path]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    jobs = "/v1/fine_tuning/jobs"
    for path in ("/v1/files", "/v1/batches", jobs, f"{jobs}/{{job_id}}/events", f"{jobs}/{{job_id}}/checkpoints"):
        names = {parameter["name"] for parameter in paths[path]["get"]["parameters"] if parameter["in"] == "query"}
        assert names >= {"after", "limit"}, path
