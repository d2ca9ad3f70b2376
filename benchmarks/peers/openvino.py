"""OpenVINO GenAI with continuous batching, from the PyPI package `openvino-genai`, in a child process."""

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.over_pipes import child
from benchmarks.peers.peer import Driver, Installed, PeerFailed, Size
from benchmarks.peers.process import TAIL
from benchmarks.peers.weights import gguf_file, once

CHILD = Path(__file__).with_name("openvino_child.py")
COMPRESS = Path(__file__).with_name("openvino_compress.py")
ISOLATED = "-I"
"""Python does not look for modules beside the script: this one here has the name of the library."""


class OpenVino:
    """Variants are GGUF types, which its own reader takes, and `int8`: the F16 file, its matrices compressed to int8
    with a scale an output by `nncf`."""

    name: ClassVar[str] = "openvino"
    variants: ClassVar[tuple[str, ...]] = ("int8", "Q8_0")

    def __init__(self, installed: Installed) -> None:
        self._installed = installed

    @asynccontextmanager
    async def start(self, variant: str, size: Size) -> AsyncIterator[Driver]:
        python = self._installed.program("bin/python")
        network, tokenizer = self._files(variant, python)
        async with child(
            [python, ISOLATED, CHILD, network, tokenizer, str(size.at_once), str(size.threads)], size
        ) as driver:
            yield driver

    def _files(self, variant: str, python: Path) -> tuple[Path, Path]:
        """The network, and a file that has the tokenizer."""
        directory = self._installed.files
        if variant != "int8":
            file = gguf_file(self._installed.model, variant, directory)
            return file, file
        source = gguf_file(self._installed.model, "F16", directory).absolute()
        return once(directory / f"{source.stem}.openvino-int8", lambda path: compress(python, source, path)), source


def compress(python: Path, source: Path, directory: Path) -> None:
    """Raises `PeerFailed`, for an environment without `nncf` too."""
    done = subprocess.run([python, ISOLATED, COMPRESS, source, directory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerFailed(f"{source} was not compressed to int8:\n{done.stderr[-TAIL:]}")
