"""How far a command is: a bar on a terminal, a line every few seconds otherwise. Always on stderr."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 5.0
"""Seconds between two plain lines."""


class Meter:
    """Counts up to `total`; `note` (requests a second, failures…) is printed beside the count."""

    def __init__(self, label: str, total: int, *, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._done = done
        self._said = time.monotonic()
        shown = sys.stderr.isatty() and "EFT_NO_PROGRESS" not in os.environ
        self._bar = _bar() if shown else None
        self._task = self._bar.add_task(label, total=total, completed=done, note="") if self._bar else None

    def advance(self, note: str = "") -> None:
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str = "") -> None:
        """So many are done by now."""
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said >= INTERVAL:
            self._said = time.monotonic()
            print(f"{self._label}: {self._done}/{self._total} {note}".rstrip(), file=sys.stderr, flush=True)

    def total(self, total: int) -> None:
        """It was not known before how many there will be."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
