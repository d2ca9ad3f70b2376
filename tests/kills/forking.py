"""Servers that start in a fraction of a second: forked from a process that has imported everything and has no threads.

`python -m tests.kills.forking` is that process: it reads a JSON list of arguments a line, forks, and answers with the
child's id.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


class Nursery:
    """The process that forks."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.kills.forking"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, model: Path, state: Path, log: Path, **settings: object) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = {"port": port, "state_dir": state, "log_format": "json", "threads": 1, **settings}
        flags = [item for name, value in given.items() for item in (f"--{name.replace('_', '-')}", str(value))]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(log), "serve", str(model), *flags]), file=self._process.stdin, flush=True)
        return Server(int(self._process.stdout.readline()), f"http://127.0.0.1:{port}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Server:
    """One of its children."""

    def __init__(self, pid: int, url: str) -> None:
        self.pid = pid
        self.url = url

    @property
    def alive(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def wait_until_ready(self, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while True:
            assert self.alive, "the server ended by itself"
            assert time.monotonic() < end, "the server does not become ready"
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)

    def end(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)
        end = time.monotonic() + 60
        while self.alive:
            assert time.monotonic() < end, f"the server does not end on {how.name}"
            time.sleep(0.005)


def main() -> None:
    import runtime.api.server
    import runtime.cli.serve
    import runtime.engine.service
    import runtime.engine.state  # noqa: F401
    from runtime.cli import app

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: none becomes a zombie
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os._exit(app.run(arguments))
        print(child, flush=True)


if __name__ == "__main__":
    main()
