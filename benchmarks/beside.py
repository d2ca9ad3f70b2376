"""Eft beside peers in environments of their own: one after the other, each alone on the machine."""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import uvloop
from msgspec import Struct
from rich.table import Table

from benchmarks.loads import LOADS, Load, measure
from benchmarks.peers import PEERS, Eft, Installed, Peer, Size
from benchmarks.work import Measurement, Prompts
from runtime.checkpoints import open_checkpoint

OURS = "Eft"
"""How the labels of our own variants begin."""


class Asked(Struct, frozen=True):
    """A peer of the command line, `NAME[:VARIANT,…]=ENVIRONMENT`."""

    name: str
    variants: tuple[str, ...]
    environment: Path

    @classmethod
    def read(cls, text: str) -> "Asked":
        """Raises `ValueError`."""
        who, equals, environment = text.partition("=")
        name, colon, variants = who.partition(":")
        if name not in PEERS:
            raise ValueError(f"{text}: there is no peer {name!r}, but {', '.join(PEERS)}")
        directory = Path(environment).expanduser()
        if not equals or not directory.is_dir():
            raise ValueError(f"{text}: expected {who}=DIRECTORY, the environment that it is installed in")
        return cls(name, tuple(variants.split(",")) if colon else PEERS[name].variants, directory)


class Entry(Struct, frozen=True):
    """A variant of a peer, to be measured."""

    label: str
    peer: Peer
    variant: str


def entries(
    peers: Sequence[Asked], ours: Sequence[str], *, model: str, files: Path, overrides: dict[str, str]
) -> list[Entry]:
    """The peers' variants, then Eft's."""
    made = [
        Entry(f"{one.name} {variant}", peer, variant)
        for one in peers
        for peer in [PEERS[one.name](Installed(environment=one.environment, model=model, files=files))]
        for variant in one.variants
    ]
    eft = Eft(Installed(environment=Path(), model=model, files=files, overrides=overrides))
    return [*made, *(Entry(f"{OURS} {variant}", eft, variant) for variant in ours)]


def measure_alone(entry: Entry, load: Load, *, model: str, threads: int, repeats: int, seed: int) -> Measurement:
    """Start it, warm it up, measure it, end it. Raises `PeerFailed`, and `CancelledError` after SIGTERM or Ctrl-C."""
    prompts = Prompts(open_checkpoint(model).tokenizer.encode, seed)
    size = Size(at_once=load.at_once, context=load.context, threads=threads)

    async def run() -> Measurement:
        task = asyncio.current_task()
        if task is not None:  # ended from outside, the peer is ended too
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with entry.peer.start(entry.variant, size) as driver:
            return await measure(driver, load, prompts, peer=entry.label, repeats=repeats)

    return uvloop.run(run())


def best_peer(results: Sequence[Measurement]) -> Measurement | None:
    """The best one that is not ours."""
    peers = [one for one in results if not one.peer.startswith(OURS)]
    return max(peers, key=lambda one: one.times_better(peers[0]), default=None)


def render(name: str, results: Sequence[Measurement]) -> Table:
    """A row for each measurement; the ratios are to the best peer."""
    best = best_peer(results)
    table = Table(title=f"{name}: {LOADS[name].about}", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in (results[0].unit, "low – high", "TTFT ms", "TPOT ms", "to the best peer"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in results:
        table.add_row(
            one.peer,
            f"{one.median:.4g}",
            f"{min(one.values):.4g} – {max(one.values):.4g}",
            _milliseconds(one.ttft),
            _milliseconds(one.tpot),
            "–" if best is None else f"{one.times_better(best):.2f}",
        )
    return table


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.4g}" if seconds else "–"


def cores() -> int:
    """That this process may use: the threads of every peer, where the command names no number."""
    return len(os.sched_getaffinity(0))
