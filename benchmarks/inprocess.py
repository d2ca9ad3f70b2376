"""Who is compared: Hugging Face `generate`, Eft in this process, and Eft behind its HTTP server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import torch
import uvloop

from benchmarks.peers.process import free_port
from benchmarks.work import Job, Outcome, greedy, load_transformers
from runtime import LLM
from runtime.cli.load_prompts import LoadSpec
from runtime.cli.loadgen import LoadReport, run_load
from settings.fields import by_name

PAD = 0
READY_TIMEOUT = 120.0


class HuggingFace:
    """`LlamaForCausalLM.generate` on the same weights in float32: static batches, padded on the left."""

    def __init__(self, model: str, *, batch: int = 1) -> None:
        self.batch = batch
        self._model = load_transformers(model)

    def batches_of(self, size: int) -> "HuggingFace":
        """The same model with another batch size."""
        other = object.__new__(HuggingFace)
        other.batch, other._model = size, self._model
        return other

    def run(self, job: Job) -> Outcome:
        begin = time.perf_counter()
        tokens: list[list[int]] = []
        for first in range(0, len(job.prompts), self.batch):
            tokens += self._generate(job.prompts[first : first + self.batch], job.output_len)
        return Outcome(time.perf_counter() - begin, tokens)

    def _generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
            )
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


class Eft:
    """The engine in this process, through `runtime.LLM`."""

    def __init__(self, model: str, *, at_once: int, overrides: Mapping[str, str]) -> None:
        settings: dict[str, Any] = {"dtype": "float32", "max_running": at_once, **overrides}
        self._llm = LLM(model, **settings)
        self.encode = self._llm.tokenizer.encode

    def run(self, job: Job) -> Outcome:
        """All prompts at once (as many as `at_once`)."""
        begin = time.perf_counter()
        completions = self._llm.generate(job.prompts, greedy(job.output_len), progress=False)
        return Outcome(time.perf_counter() - begin, [completion.token_ids for completion in completions])


class OneByOne:
    """A peer that is given its prompts one after the other."""

    def __init__(self, peer: Eft) -> None:
        self._peer = peer

    def run(self, job: Job) -> Outcome:
        outcomes = [self._peer.run(Job([prompt], job.output_len)) for prompt in job.prompts]
        return Outcome(sum(o.seconds for o in outcomes), [row for o in outcomes for row in o.tokens])


@contextmanager
def served(model: str, *, at_once: int, overrides: Mapping[str, str]) -> Iterator[str]:
    """`eft serve` in a process of its own, ready to answer. Yields its URL."""
    port = free_port()
    given = {"dtype": "float32", "max_running": str(at_once), "log_requests": "false", **overrides}
    environment = {**os.environ, **{by_name()[name].env: value for name, value in given.items()}}
    command = [sys.executable, "-m", "runtime", "serve", model, "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(READY_TIMEOUT)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Raise `RuntimeError` when the server ends, or is not ready in time."""
    end = time.monotonic() + READY_TIMEOUT
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < end and server.poll() is None:
            with suppress(httpx.TransportError):  # not listening yet
                if client.get(f"{url}/ready").status_code == 200:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"eft serve did not become ready (exit code {server.poll()})")


def load(url: str, *, requests: int, at_once: int, input_len: int, output_len: int, seed: int) -> LoadReport:
    """A closed loop against the server, with exact lengths. Raises `RuntimeError` when a request failed."""
    spec = LoadSpec(
        url=url,
        endpoint="completions",
        requests=requests,
        concurrency=at_once,
        input_len=input_len,
        output_len=output_len,
        seed=seed,
    )
    report = uvloop.run(run_load(spec))
    if report.failed:
        raise RuntimeError(f"{report.failed} of {requests} requests failed: {report.errors}")
    return report
