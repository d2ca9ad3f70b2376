"""Output of the commands: console, errors, progress."""

import os
import sys
import time
from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_UNBROKEN = 4096
"""Columns without a terminal: each row of a table is one line."""


def console() -> Console:
    """Standard output. As wide as the terminal; piped, wide enough that nothing is wrapped."""
    width = None if sys.stdout.isatty() else _UNBROKEN
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)


# -- errors ----------------------------------------------------------------------------------------
#
# Failures of a command. The exit code is on the class.


class CommandError(Exception):
    """The command failed."""

    exit_code: ClassVar[int] = 1


class UsageError(CommandError):
    """Wrong usage: flags, files, settings."""

    exit_code = 2


# -- progress --------------------------------------------------------------------------------------
#
# Progress of a command: a bar on a terminal, a line every few seconds otherwise. Always on stderr.

INTERVAL = 5.0
"""Seconds between two plain lines."""


class Meter:
    """Counts up to `total`; `note` (requests a second, failures…) is printed beside the count."""

    def __init__(self, label: str, total: int, *, done: int = 0, remaining: bool = True) -> None:
        """`remaining`: the bar shows the remaining time. Off where the notes show a better estimate."""
        self._label = label
        self._total = total
        self._done = done
        self._said = time.monotonic()
        shown = sys.stderr.isatty() and "EFT_NO_PROGRESS" not in os.environ
        self._bar = _bar(remaining) if shown else None
        self._task = self._bar.add_task(label, total=total, completed=done, note="") if self._bar else None

    def advance(self, note: str = "") -> None:
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str = "", *, part: float = 0.0) -> None:
        """Set the number done, and the fraction `part` of the next one."""
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done + part, note=note)
        elif time.monotonic() - self._said >= INTERVAL:
            self._said = time.monotonic()
            print(f"{self._label}: {self._done}/{self._total} {note}".rstrip(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show `text` while nothing is counted yet: beside the bar, or as a line of its own every few seconds."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note=text)
        elif time.monotonic() - self._said >= INTERVAL:
            self._said = time.monotonic()
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)

    def total(self, total: int) -> None:
        """Set the total, if it was not known at the start."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def say(self, text: str) -> None:
        """Print a separate line above the bar."""
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


def _bar(remaining: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TimeRemainingColumn()] if remaining else []),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
