"""transformers + PEFT that train in a process of their own beside our server: what a user would do without Eft.

The process runs this file. It writes a dot for each third of a layer's share of a step: one after a layer's forward
pass, two when its backward pass begins. So its speed is known within a step.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

THIRDS = 3
STEP_TOKENS = 512
START_SECONDS = 300.0


class PeftProcess:
    """The training process, stopped except inside `running`."""

    def __init__(self, model: str, threads: int) -> None:
        """Start it, and wait until it trains. Raises `RuntimeError` where it ends before that."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.coserving.peer", model]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        layers = self._process.stdout.readline().strip()
        if not layers.isdigit():
            self.close()
            raise RuntimeError(f"the training process did not start: it wrote {layers!r}")
        self._tokens_per_dot = STEP_TOKENS / (THIRDS * int(layers))
        self._dots = 0
        self._reader = threading.Thread(target=self._count, name="dots", daemon=True)
        self._reader.start()
        deadline = time.monotonic() + START_SECONDS
        while self._dots < THIRDS * int(layers):  # the first step
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError("the training process did not finish its first step")
            time.sleep(0.05)
        self.stop()

    @property
    def tokens_done(self) -> float:
        """Tokens trained on so far."""
        return self._dots * self._tokens_per_dot

    @property
    def memory(self) -> int:
        """Bytes that it holds."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it train meanwhile."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        if getattr(self, "_reader", None) is not None:
            self._reader.join()
        self._process.stdout.close()

    def _count(self) -> None:
        assert self._process.stdout is not None
        while self._process.stdout.read(1):
            self._dots += 1


def train(model: str) -> None:
    """Train without end, as the training process."""
    from benchmarks.training import peft_model, peft_step, random_examples

    peft = peft_model(model)
    layers = peft.base_model.model.model.layers
    print(len(layers), flush=True)
    for layer in layers:
        layer.register_forward_hook(_dot)
    optimizer = _optimizer(peft)
    rng, vocab = random.Random(0), int(peft.config.vocab_size)
    while True:
        peft_step(peft, random_examples(rng, vocab))
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(peft: Any) -> Any:
    import torch

    return torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-5)


def _dot(module: Any, args: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    os.write(1, b".")
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: os.write(1, b"..") and None)


if __name__ == "__main__":
    train(sys.argv[1])
