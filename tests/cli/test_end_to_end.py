"""The commands with a real engine and a tiny model; `eft serve` as a process of its own."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.batch_files import chat, results, write
from tests.cli.conftest import Eft
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def test_batch_runs_a_model_here(eft: Eft, tiny_model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    limits = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    lines = [chat(f"r{n}", f"question {n}", **limits) for n in range(6)]
    write(source, *lines, chat("wrong", "x", max_tokens=0))
    command = ["batch", source, output, "--model", tiny_model, "--concurrency", 3, "--max-batched-tokens", 64]
    assert eft(*command).code == 1
    found = results(output)
    assert found["wrong"]["response"]["status_code"] == 400
    assert found["wrong"]["response"]["body"]["error"]["param"] == "max_tokens"
    for n in range(6):
        body = found[f"r{n}"]["response"]["body"]
        assert body["usage"]["completion_tokens"] == 5
        assert body["model"] == tiny_model.name
        assert found[f"r{n}"]["response"]["request_id"]
    again = eft(*command)
    assert "0 succeeded, 0 failed; 7 done before (1 of them failed)" in again.out


def test_chat_streams_from_a_model_here(eft: Eft, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    done = eft("chat", tiny_model, "--json", "--max-tokens", 4, "--temperature", 0)
    first, second = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0
    assert first["model"] == tiny_model.name
    assert first["answer"]["finish_reason"] in ("length", "stop")
    assert first["answer"]["usage"]["completion_tokens"] <= 4
    assert second["answer"]["usage"]["prompt_tokens"] > first["answer"]["usage"]["prompt_tokens"]


def serve(*arguments: str, cwd: Path, stdout: int) -> subprocess.Popen[str]:
    """`eft serve` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "runtime", "serve", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def serving(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`eft serve` as a process, and what it printed when it was ready."""
    process = serve(*arguments, "--port", "0", cwd=cwd, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        printed = ""
        while "flush=True)" not in printed:  # the last line of the snippets
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"eft serve ended early: {process.communicate()[1]}")
            printed += line
        yield process, printed
    finally:
        process.kill()
        process.communicate()


def test_serve_prints_snippets_that_work_and_ends_on_sigterm(tiny_model: Path, tmp_path: Path) -> None:
    with serving(str(tiny_model), "--api-key", "secret-key", cwd=tmp_path) as (process, printed):
        assert "secret-key" not in printed
        assert printed.startswith(f"Serving {tiny_model.name} at http://127.0.0.1:")
        curl = re.search(r"curl .*?\}'$", printed, re.DOTALL | re.MULTILINE)
        assert curl is not None
        _, url, *options = shlex.split(curl[0].replace("$EFT_API_KEY", "secret-key"))
        headers: dict[str, Any] = dict(
            option.split(": ", 1) for option in options if ": " in option and "{" not in option
        )
        answer = httpx.post(url, headers=headers, content=options[-1], timeout=60, trust_env=False)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "secret-key" not in logged


def test_the_python_snippet_runs_as_it_is_printed(tiny_model: Path, tmp_path: Path) -> None:
    with serving(str(tiny_model), "--max-model-len", "256", cwd=tmp_path) as (_, printed):
        program = printed[printed.index("from openai") :]
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("moment", ["first imports", "event loop", "listening", "loading"])
def test_a_server_that_is_stopped_while_it_starts(tiny_model: Path, tmp_path: Path, moment: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--port", str(port), "--log-level", "warning")
    process = serve(str(tiny_model), *flags, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        mapped = Path(f"/proc/{process.pid}/maps")
        wait_until(
            {
                "first imports": lambda: "msgspec" in mapped.read_text(),
                "event loop": lambda: "uvloop" in mapped.read_text(),
                "listening": lambda: answers(port),
                "loading": lambda: "libtorch" in mapped.read_text(),
            }[moment],
            60,
        )
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


COMPUTES = """
computing = threading.Event()

def compute():
    while True:
        torch.ones(200, 200) @ torch.ones(200, 200)
        computing.set()

threading.Thread(target=compute, daemon=True).start()
computing.wait()
"""
IDLES = """
pool = concurrent.futures.ThreadPoolExecutor()
pool.submit(print, end="").result()
"""


@pytest.mark.parametrize("threads", [COMPUTES, IDLES], ids=["a load that was given up", "an idle pool"])
def test_the_process_ends_whatever_its_threads_do(threads: str) -> None:
    """A daemon thread that computes would abort the process in an interpreter that is taken apart; that of a pool waits
    for work until it is told that there will be none."""
    program = "import concurrent.futures, sys, threading\nimport torch\nfrom runtime.cli import main\n"
    program += threads + 'sys.argv = ["eft", "config", "show"]\nsys.exit(main())\n'
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "max_running" in done.stdout


def test_serve_reports_what_it_cannot_load(eft: Eft, tmp_path: Path) -> None:
    done = eft("serve", tmp_path / "nothing", "--port", 0)
    assert done.code == 1
    assert "is not a model" in done.err
    assert "Traceback" not in done.err
