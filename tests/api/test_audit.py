"""The audit log: who changed the server, or tried to."""

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.access.audit import AuditLog
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.support.logs import configure
from settings.api import ServerSettings
from settings.schema import ObservabilitySettings, Settings
from tests.api.fakes import FakeService
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio
YAML = {"content-type": "application/yaml"}


async def asked(tmp_path: Path, *requests: tuple[str, str, dict[str, Any]], **server: Any) -> list[dict[str, Any]]:
    """The lines of the file, after these requests with an admin key `boss` and an inference key `user`."""
    world = World(tmp_path)
    await world.start()
    file = tmp_path / "audit.jsonl"
    settings = Settings(server=ServerSettings(api_key=("user",), admin_key=("boss",), audit_file=str(file), **server))
    app = create_app(ServiceHandle(FakeService(), world.manager), settings)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        for method, path, options in requests:
            await client.request(method, path, **options)
    app.state.api.access.audit.close()
    await world.stop(0.0)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def as_key(key: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **headers}


async def test_actions_and_refusals(tmp_path: Path) -> None:
    headers = as_key("boss", **YAML, **{"x-request-id": "req-1"})
    lines = await asked(
        tmp_path,
        ("POST", "/admin/train", {"content": b"name: shop\nsteps: 1\n", "headers": headers}),
        ("POST", "/admin/jobs/ftjob-x/cancel", {"headers": as_key("boss")}),
        ("POST", "/admin/train", {"content": b"name: shop\n", "headers": as_key("user", **YAML)}),
        ("DELETE", "/admin/adapters/a", {"headers": as_key("wrong")}),
        ("POST", "//admin/cache/reset", {}),
    )
    assert [(line["action"], line["outcome"], line["status"]) for line in lines[:4]] == [
        ("POST /admin/train", "done", 201),
        ("POST /admin/jobs/{job_id}/cancel", "failed", 404),
        ("POST /admin/train", "refused", 403),
        ("DELETE /admin/adapters/{name}", "refused", 401),
    ]
    first = lines[0]
    assert first["target"].startswith("ftjob-")
    assert first["key"].startswith("key-")
    assert first["client"] == "127.0.0.1"
    assert first["request_id"] == "req-1"
    assert first["time"].endswith("+00:00")
    assert lines[1]["target"] == "ftjob-x"
    assert lines[2]["key"] != first["key"]  # the inference key's
    assert lines[3]["target"] == "a"
    assert lines[3]["key"] == ""
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600
    for secret in ("boss", "wrong"):
        assert secret not in (tmp_path / "audit.jsonl").read_text()


async def test_reading_and_inference_are_no_actions(tmp_path: Path) -> None:
    lines = await asked(
        tmp_path,
        ("GET", "/admin/jobs", {"headers": as_key("boss")}),
        ("GET", "/admin/jobs", {}),
        ("POST", "/tokenize", {"json": {"prompt": "a"}, "headers": as_key("user")}),
        ("POST", "/nowhere", {"headers": as_key("boss")}),
    )
    assert lines == []


async def test_a_dry_run_is_no_action_but_refusals_of_one_are(tmp_path: Path) -> None:
    lines = await asked(
        tmp_path,
        ("POST", "/admin/train?dry_run=1", {"content": b"name: shop\nsteps: 1\n", "headers": as_key("boss", **YAML)}),
        ("POST", "/admin/train?dry_run=1", {"content": b"steps: 1\n", "headers": as_key("boss", **YAML)}),
        ("POST", "/admin/train?dry_run=1", {"content": b"name: shop\n", "headers": as_key("user", **YAML)}),
    )
    assert [(line["action"], line["status"]) for line in lines] == [("POST /admin/train", 403)]


async def test_the_server_log_has_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(ObservabilitySettings(log_level="info", log_format="json"))
    await asked(tmp_path, ("POST", "/admin/cache/reset", {"headers": as_key("boss")}))
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"event": "audit"' in line]
    assert (line["action"], line["outcome"]) == ("POST /admin/cache/reset", "failed")  # there is no engine behind this


async def test_a_target_is_one_line_and_bounded(tmp_path: Path) -> None:
    path = "/admin/adapters/" + "%0a%1b[31m" + "x" * 500
    (line,) = await asked(tmp_path, ("DELETE", path, {"headers": as_key("boss")}))
    assert len(line["target"]) == 200


def test_a_file_that_cannot_be_written_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(ObservabilitySettings(log_level="error", log_format="json"))
    log = AuditLog(tmp_path / "none" / "audit.jsonl")
    with pytest.raises(OSError, match="No such file"):
        log.check()
    log.write(key="k", action="a", target="t", status=200, client="", request_id="r")
    log.close()
    assert "audit_not_written" in capsys.readouterr().err


def test_what_comes_after_the_end_is_written_too(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.close()
    log.write(key="k", action="late", target="", status=200, client="", request_id="")
    assert json.loads((tmp_path / "audit.jsonl").read_text())["action"] == "late"


def test_a_rotated_file_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file)
    log.check()
    log.write(key="k", action="first", target="", status=200, client="", request_id="")
    log.close()
    again = AuditLog(file)
    file.rename(tmp_path / "audit.jsonl.1")
    again.write(key="k", action="second", target="", status=200, client="", request_id="")
    again.close()
    assert json.loads(file.read_text())["action"] == "second"
    assert json.loads((tmp_path / "audit.jsonl.1").read_text())["action"] == "first"
