"""A real Prometheus, with our rules, that scrapes a server of a test."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

FOLDER = Path(__file__).parents[2] / "settings" / "observability"
PROMETHEUS = shutil.which("prometheus")
WINDOW = "8s"
"""Of the rates that the tests ask for: what Grafana puts into $__rate_interval."""


VARIABLES = {"$__rate_interval": WINDOW, "$__range": "1m", "$model_name": ".*", "$instance": ".*"}


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression. Raises `AssertionError` for one that Prometheus refuses."""
        answer = self._http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def until(self, expression: str, seconds: float = 30) -> list[dict[str, Any]]:
        """Its result, once it has some."""
        end = time.monotonic() + seconds
        while not (found := self.ask(expression)):
            assert time.monotonic() < end, f"no data: {expression}"
            time.sleep(0.2)
        return found

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus with the project's own configuration, but for the target and how often it is scraped."""
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    config = re.sub(r"127\.0\.0\.1:8000", target, config)
    config = re.sub(r"(scrape|evaluation)_interval: \S+", r"\1_interval: 500ms", config)
    (folder / "prometheus.yml").write_text(config)
    for rules in ("alerts.yml", "rules.yml"):
        shutil.copy(FOLDER / rules, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=data"]
    command = [str(PROMETHEUS), *flags, "--log.level=warn"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + 30
        while not found.ready():
            assert process.poll() is None, "Prometheus ended"
            assert time.monotonic() < end, "Prometheus did not start"
            time.sleep(0.1)
        yield found
    finally:
        found.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def dashboards() -> dict[str, Any]:
    """Name of the file → dashboard."""
    files = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """(panel's title, expression with the variables filled in), of every panel."""
    found = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            found.append((panel["title"], text))
    return found
