"""Readiness for a service manager, and what SIGHUP takes again."""

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from runtime.access import Access
from runtime.api.app import create_app
from runtime.api.supervisor import Reloader, notify
from runtime.support.logs import configure
from settings.load import load
from settings.schema import ObservabilitySettings, Settings
from tests.api.fakes import FakeService
from tests.end_to_end.process import ServerProcess
from tests.tree import ROOT

pytestmark = pytest.mark.anyio

UNIT = ROOT / "settings" / "deploy" / "eft.service"


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> socket.socket:
    """The socket of a service manager."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(30)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listening


def test_the_service_manager_is_told(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    notify("READY=1", "STATUS=here")
    assert manager.recv(1000) == b"READY=1\nSTATUS=here"
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


@pytest.fixture
def _logging() -> None:
    configure(ObservabilitySettings(log_level="info", log_format="json"))


def reloader(file: Path, settings: Settings) -> tuple[Reloader, httpx.AsyncClient]:
    app = create_app(FakeService(), settings)  # type: ignore[arg-type]
    found = Reloader(app.state.api, Access(settings), lambda: load(env={}, file=file))
    return found, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


@pytest.mark.usefixtures("_logging")
async def test_limits_and_log_level_are_taken_and_the_rest_is_named(tmp_path: Path) -> None:
    file = tmp_path / "eft.toml"
    found, client = reloader(file, Settings())
    body = {"prompt": "a", "stop": ["x"] * 3, "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    file.write_text('[limits]\nmax_stop = 2\n[observability]\nlog_level = "debug"\n[scheduler]\nmax_running = 3\n')
    with capture_logs() as logs:
        await found.reload()
    (log,) = [log for log in logs if log["event"] == "settings_reloaded"]
    assert set(log["changed"]) == {"limits.max_stop", "observability.log_level"}
    assert log["need_a_new_start"] == ["scheduler.max_running"]
    answer = await client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")
    settings = {one["key"]: one for one in (await client.get("/admin/system")).json()["settings"]}
    assert settings["limits.max_stop"]["origin"] == f"file {file}"
    assert settings["scheduler.max_running"]["origin"] == "default"


async def test_faulty_settings_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "eft.toml"
    file.write_text("[limits]\nmax_stop = 2\nmax_stopp = 1\n")
    found, client = reloader(file, Settings())
    with capture_logs() as logs:
        await found.reload()
    assert "max_stopp" in str(next(log for log in logs if log["event"] == "settings_not_reloaded")["problems"])
    body = {"prompt": "a", "stop": ["x"] * 3, "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


def test_a_real_server_is_ready_reloads_and_stops(tiny_model: Path, tmp_path: Path, manager: socket.socket) -> None:
    file = tmp_path / "eft.toml"
    file.write_text("[limits]\nmax_stop = 4\n")
    with ServerProcess(str(tiny_model), tmp_path / "state", config=file) as server:
        told = manager.recv(1000), manager.recv(1000)
        assert told[0].startswith(b"STATUS=loading")
        assert told[1].startswith(b"READY=1\nSTATUS=serving tiny-llama at http://")
        file.write_text("[limits]\nmax_stop = 1\n")
        server._process.send_signal(signal.SIGHUP)
        assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(1000) == b"READY=1"
        body = {"prompt": "a", "stop": ["x", "y"], "max_tokens": 1}
        assert server.http.post("/v1/completions", json=body).status_code == 400
        server._process.terminate()
        assert manager.recv(1000) == b"STOPPING=1"
        assert server.wait_for_exit() == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8").replace("/opt/eft/bin/eft", shutil.which("true") or "/bin/true")
    (tmp_path / "eft.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "eft.service")], capture_output=True, text=True, check=False
    )
    assert "eft.service" not in done.stderr, done.stderr
