"""`eft serve` in a process of its own, to be asked, killed and started again."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
ENDED = {"succeeded", "failed", "cancelled"}


class ServerProcess:
    """A server on a free port, over a state directory that outlives it."""

    def __init__(
        self,
        model: str,
        state: Path,
        *,
        failpoints: str = "",
        descriptors: int | None = None,
        file_size: int | None = None,
        log: Path | None = None,
        **settings: object,
    ) -> None:
        """`settings` are flags, given once for each value of a list. `descriptors`: its hard limit of open files.
        `file_size`: bytes to which a file may grow, as on a disk that is full. `log`: file for its standard error."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        given = {"port": port, "state_dir": state, "log_level": "warning", **settings}
        flags = [
            item
            for name, value in given.items()
            for one in (value if isinstance(value, list) else [value])
            for item in (f"--{name.replace('_', '-')}", str(one))
        ]
        environment = os.environ | {"EFT_FAILPOINTS": failpoints}
        command = [sys.executable, "-m", "runtime", "serve", model, *flags]
        if descriptors is not None:
            command = ["prlimit", f"--nofile={descriptors}", *command]
        if file_size is not None:
            command = ["prlimit", f"--fsize={file_size}", *command]
        with open(os.devnull if log is None else log, "ab") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=None if log is None else errors,
            )
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def __enter__(self) -> Self:
        try:
            wait_until(self._is_ready, 90)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self.http.close()

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def wait_for_exit(self) -> int:
        return self._process.wait(120)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    @property
    def soft_limit(self) -> int:
        """Of open descriptors."""
        return resource.prlimit(self.pid, resource.RLIMIT_NOFILE)[0]

    @property
    def open_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"the server ended with {self._process.returncode}"
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    # -- training ------------------------------------------------------------------------------

    def train(self, recipe: str, data: dict[str, bytes]) -> str:
        """Post a recipe with its data files; the job's id."""
        files = [("recipe", ("recipe.yaml", recipe.encode(), "application/yaml"))]
        files += [("data", (name, content, "application/octet-stream")) for name, content in data.items()]
        answer = self.http.post("/admin/train", files=files)
        assert answer.status_code in (201, 202), answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/admin/jobs/{job_id}").json()
        return found

    def wait_for_job(self, job_id: str, seconds: float = 240) -> dict[str, Any]:
        """The job once it has ended."""
        wait_until(lambda: self.job(job_id)["status"] in ENDED, seconds)
        return self.job(job_id)

    def losses(self, job_id: str) -> dict[int, float]:
        """Step → loss."""
        rows = self.http.get(f"/admin/jobs/{job_id}/metrics", params={"limit": 1000}).json()["data"]
        return {row["step"]: row["loss"] for row in rows if row.get("kind", row.get("type")) == "step"}

    # -- asking --------------------------------------------------------------------------------

    def tokens(self, model: str, prompt: str, count: int = 16) -> list[int]:
        """A greedy answer to a chat, as token ids."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": count,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    def ask(self, model: str, prompt: str, count: int = 24) -> str:
        """A greedy answer to a chat."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": count,
            "temperature": 0,
        }
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])
