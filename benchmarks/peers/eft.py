"""Eft itself as a server, measured through the same client as the peers."""

import sys
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from benchmarks.peers.peer import Driver, Installed, Size
from benchmarks.peers.process import free_port, served
from settings.fields import by_name


class Eft:
    """Variants are values of the setting `quantization`."""

    name: ClassVar[str] = "eft"
    variants: ClassVar[tuple[str, ...]] = ("none", "int8", "int4")

    def __init__(self, installed: Installed) -> None:
        self._installed = installed

    def start(self, variant: str, size: Size) -> AbstractAsyncContextManager[Driver]:
        port = free_port()
        command = [sys.executable, "-m", "runtime", "serve", self._installed.model, "--port", str(port)]
        environment = {by_name()[name].env: value for name, value in self._settings(variant, size).items()}
        return served(command, size, port=port, ready="/ready", environment=environment)

    def _settings(self, variant: str, size: Size) -> dict[str, str]:
        return {
            "quantization": variant,
            "threads": str(size.threads),
            "max_running": str(size.at_once),
            "log_requests": "false",
            **self._installed.overrides,
        }
