"""A peer's process: started, watched until it is ready, and ended with all its children."""

import asyncio
import os
import signal
import socket
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

from benchmarks.peers.over_http import HttpDriver
from benchmarks.peers.peer import PeerFailed, Size
from runtime.cli.client import served_model

HOST = "127.0.0.1"

READY_TIMEOUT = 300.0
"""Seconds. vLLM compiles its model when it starts."""
END_TIMEOUT = 20.0
"""Seconds to end by itself, before it is killed."""
TAIL = 2000
"""Bytes of a peer's log that an error shows."""


def free_port() -> int:
    """A port of `HOST` that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running(
    command: Sequence[str | Path], size: Size, *, environment: Mapping[str, str] | None = None, lines: bool = False
) -> AsyncIterator[tuple[Process, IO[bytes]]]:
    """The process, and the file that its log goes to. `lines` gives it pipes for its input and output."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(size.threads), **(environment or {})}
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe if lines else DEVNULL,
            stdout=pipe if lines else log,
            stderr=log,
            env=variables,
            start_new_session=True,  # one group with its children, so that all of them can be ended
            limit=1 << 20,
        )
        try:
            yield process, log
        finally:
            await _end(process)


async def _end(process: Process) -> None:
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_TIMEOUT)


@asynccontextmanager
async def served(
    command: Sequence[str | Path], size: Size, *, port: int, ready: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[HttpDriver]:
    """An OpenAI-style server that answers `ready` with 200 once it can be used. Raises `PeerFailed`."""
    async with running(command, size, environment=environment) as (process, log):
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=None, trust_env=False) as client:
            await _until_ready(client, ready, process, log)
            model = await served_model(client)
        yield HttpDriver(HOST, port, model)


async def _until_ready(client: httpx.AsyncClient, path: str, process: Process, log: IO[bytes]) -> None:
    end = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < end and process.returncode is None:
        with suppress(httpx.TransportError):  # not listening yet
            if (await client.get(path)).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise not_ready(process, log)


def not_ready(process: Process, log: IO[bytes]) -> PeerFailed:
    """With the end of its log."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL))
    said = log.read().decode(errors="replace").strip()
    how = "did not become ready" if process.returncode is None else f"ended with exit code {process.returncode}"
    return PeerFailed(f"The peer {how}. The end of its log:\n{said}")
