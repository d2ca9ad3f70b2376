"""What every peer is to the measurements: a name, its variants, and a way to start one of them."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar, Protocol

from msgspec import Struct

from runtime.cli.loadgen import Sample


class Size(Struct, frozen=True, kw_only=True):
    """What a peer is set up for: no smaller, so that it works, and no larger, so that it is at its best."""

    at_once: int
    """Requests at once."""
    context: int
    """Most tokens of a request, prompt and output together."""
    threads: int
    """Of the CPU."""


class Driver(Protocol):
    """A running peer that takes requests, from several tasks at once."""

    async def complete(self, prompt: list[int], output_len: int) -> Sample:
        """Generate exactly so many tokens, greedily and past any end token. A failure is in `Sample.error`."""


class Peer(Protocol):
    """Something that can be started and measured. One file of this package each."""

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    """The forms of the weights that are measured, where the command names none."""

    def start(self, variant: str, size: Size) -> AbstractAsyncContextManager[Driver]:
        """Run it, ready to answer, in a process of its own. Raises `PeerFailed`."""


class PeerFailed(Exception):
    """A peer is not installed where it was said to be, did not start, or did not do what it was asked."""


class Installed(Struct, frozen=True, kw_only=True):
    """What a peer is made from."""

    environment: Path
    """Its virtual environment; Eft's own is where this process runs."""
    model: str
    """As `eft serve` takes it."""
    files: Path
    """Directory for the model in the peers' formats. Written once, then reused."""
    overrides: dict[str, str] = {}
    """Settings of Eft."""

    def program(self, *patterns: str) -> Path:
        """The first file of the environment that one of these patterns finds. Raises `PeerFailed` with all of them."""
        for pattern in patterns:
            for path in sorted(self.environment.glob(pattern)):
                return path.absolute()
        raise PeerFailed(f"{self.environment} has none of: {', '.join(patterns)}")
