"""Two nodes, as torchrun sees them: two of it, with a rank each."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from runtime import LLM, SamplingParams
from runtime.model.config import ModelLoadError
from runtime.workers.parallel.torchrun import Torchrun
from tests.end_to_end.process import ROOT
from tests.waiting import wait_until

GIVEN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "a",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def two_nodes(model: Path, state: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The server's URL, and both of torchrun."""
    meeting, port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting}", "--local-addr", "127.0.0.1"),
        *("-m", "runtime", "serve", str(model), "--port", str(port), "--threads", "1", "--interface", "lo"),
        *("--state-dir", str(state), "--log-level", "warning", "--rank-timeout", "20"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        yield f"http://127.0.0.1:{port}", nodes
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def test_two_nodes_serve_one_model_and_end_together(tiny_model: Path, tmp_path: Path) -> None:
    """A rank of another node cannot be started again from here, so the server ends, and torchrun may start all."""
    expected = LLM(str(tiny_model)).generate(
        [[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    )
    with two_nodes(tiny_model, tmp_path) as (url, nodes), httpx.Client(base_url=url, trust_env=False) as http:

        def ready() -> bool:
            assert all(node.poll() is None for node in nodes)
            try:
                return http.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, 240)
        body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body | {"return_token_ids": True}, timeout=60).json()
        assert answer["choices"][0]["token_ids"] == expected[0].token_ids
        processes = [psutil.Process(node.pid) for node in nodes]
        ranks = [child for process in processes for child in process.children(recursive=True)]
        assert len(ranks) == 3  # the server, its rank, and the other node's
        (follower,) = (one for one in ranks if not one.children() and "serve" in one.cmdline())
        follower.send_signal(signal.SIGKILL)
        assert all(node.wait(60) != 0 for node in nodes)
        assert not psutil.wait_procs(ranks, timeout=20)[1]


def test_what_torchrun_says() -> None:
    torchrun = Torchrun.here(GIVEN)
    assert torchrun is not None
    assert (torchrun.rank, torchrun.size, torchrun.local_rank, torchrun.run) == (3, 4, 1, "eft/a/0")
    assert Torchrun.here({"RANK": "3"}) is None
    with pytest.raises(ModelLoadError, match="node by node"):
        Torchrun.here(GIVEN | {"RANK": "2"})
    with pytest.raises(ModelLoadError, match="c10d"):
        Torchrun.here(GIVEN | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
