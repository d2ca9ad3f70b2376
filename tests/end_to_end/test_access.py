"""Access to real processes: the admin token and the command line, keys that change while a server runs."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.process import ROOT, ServerProcess
from tests.waiting import wait_until


def eft(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process, with no settings but these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EFT_")}
    return subprocess.run(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        env={**kept, **environment},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_the_command_line_sends_a_local_servers_token(tiny_model: Path, tmp_path: Path) -> None:
    """Also where an API key is set, which an anonymous request from this machine is not enough for."""
    state, token = tmp_path / "state", tmp_path / "state" / "admin-token"
    with ServerProcess(str(tiny_model), state, api_key="user") as server:
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        first = token.read_text().strip()
        refused = server.http.get("/admin/jobs")
        assert refused.status_code == 403
        assert "admin-token" in refused.json()["error"]["message"]
        assert str(tmp_path) not in refused.text
        assert server.http.get("/admin/jobs", headers={"authorization": "Bearer user"}).status_code == 403
        assert server.http.get("/admin/jobs", headers={"authorization": f"Bearer {first}"}).status_code == 200

        found = eft("jobs", "list", "--json", "--url", server.url, EFT_TRAINER_STATE_DIR=str(state))
        assert (found.returncode, json.loads(found.stdout)["data"]) == (0, []), found.stderr
        assert eft("adapters", "list", "--url", server.url, EFT_TRAINER_STATE_DIR=str(state)).returncode == 0
        elsewhere = eft("jobs", "list", "--url", server.url, EFT_TRAINER_STATE_DIR=str(tmp_path / "other"))
        assert elsewhere.returncode == 1
        assert "403" in elsewhere.stderr
        server.kill()
    assert token.exists()  # it could not tidy up
    with ServerProcess(str(tiny_model), state, api_key="user") as server:
        second = token.read_text().strip()
        assert second != first
        assert server.http.get("/admin/jobs", headers={"authorization": f"Bearer {first}"}).status_code == 403
        assert server.http.get("/admin/jobs", headers={"authorization": f"Bearer {second}"}).status_code == 200
    assert not token.exists()


def test_keys_are_rotated_while_the_server_runs(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def new(name: str, *arguments: str) -> str:
        made = eft("keys", "new", name, "--file", path, *arguments)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    first = new("first")
    with ServerProcess(str(tiny_model), tmp_path / "state", keys_file=path) as server:

        def status(key: str, path: str = "/v1/models") -> int:
            return server.http.get(path, headers={"authorization": f"Bearer {key}"}).status_code

        assert (status(first), status("wrong")) == (200, 401)
        second = new("second")
        wait_until(lambda: status(second) == 200, 30)  # by itself
        boss = new("boss", "--scope", "admin")
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: status(boss) == 200, 30)
        assert (status(second, "/admin/jobs"), status(boss, "/admin/jobs")) == (403, 200)
        assert eft("keys", "revoke", "first", "--file", path).returncode == 0
        os.kill(server.pid, signal.SIGHUP)
        wait_until(lambda: status(first) == 401, 30)
        assert status(second) == 200
        path.write_text("broken")
        os.kill(server.pid, signal.SIGHUP)
        for _ in range(20):
            assert status(second) == 200
        server._process.terminate()
        assert server.wait_for_exit() == 0


def test_a_server_whose_keys_cannot_be_read_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    """It would be open, or closed to everybody."""
    broken = tmp_path / "keys.json"
    broken.write_text("{")
    for path in (tmp_path / "none.json", broken):
        done = eft("serve", tiny_model, "--port", 0, "--keys-file", path, "--log-format", "json")
        assert done.returncode == 1
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr
