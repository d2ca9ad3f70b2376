"""Ranks that hang: each rank notes where it is, and the server looks whether any of them moves."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from runtime.support.durable import PRIVATE_FILE
from runtime.trainer.launched.files import PLACE

PLACE_BYTES = 512
"""Size of a rank's file, which is overwritten in place: on a disk that is full, too."""


class RankPlace(Struct, frozen=True, kw_only=True):
    """A rank's place in its work."""

    rank: int
    pid: int
    host: str
    moves: int
    """Parts of its work that it has begun. Ranks of one model begin the same ones, so the lowest number is behind."""
    doing: str
    """The part that it has begun last."""


class PlaceFile:
    """A rank's note of where it is."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Raises `OSError`."""
        self._rank, self._host, self._moves = rank, socket.gethostname()[:100], 0
        self._file = os.open(folder / f"{PLACE}{rank}", os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        self.move("starts")

    def move(self, doing: str) -> None:
        """Note a part of the work that begins: a few microseconds, and nothing is synced."""
        self._moves += 1
        place = RankPlace(rank=self._rank, pid=os.getpid(), host=self._host, moves=self._moves, doing=doing)
        os.pwrite(self._file, msgspec.json.encode(place).ljust(PLACE_BYTES), 0)


def read_places(folder: Path) -> list[RankPlace]:
    """The places of the ranks, by rank; one whose note is being written is left out."""
    found = []
    for path in folder.glob(f"{PLACE}*"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=RankPlace))
        except (OSError, msgspec.MsgspecError):
            continue
    return sorted(found, key=lambda place: place.rank)


class StallWatch:
    """Time since a rank has moved. It begins with the first rank that starts."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """`seconds`: after which ranks that do not move hang."""
        self._folder, self._seconds = folder, seconds
        self._pause = min(1.0, seconds / 10)
        self._known: list[RankPlace] = []
        self._idle = 0.0
        self._looked = time.monotonic()

    def look(self) -> str | None:
        """A sentence that names the ranks which hold up the others, once no rank has moved for too long."""
        passed = time.monotonic() - self._looked
        if passed < self._pause:
            return None
        self._looked += passed
        places = read_places(self._folder)
        if places != self._known or not places:
            self._known, self._idle = places, 0.0
            return None
        # A machine that sleeps stops the ranks as it stops this process: that is no time in which they could move.
        self._idle += min(passed, 2 * self._pause)
        return None if self._idle < self._seconds else _sentence(places, self._idle)


def _sentence(places: Sequence[RankPlace], seconds: float) -> str:
    stopped = [place for place in places if _is_stopped(place)]
    fewest = min(place.moves for place in places)
    behind = stopped or [place for place in places if place.moves == fewest]
    named = " and ".join(f"rank {place.rank} (process {place.pid}, which {place.doing})" for place in behind)
    if len(behind) == len(places) > 1:
        return f"No rank has moved for {seconds:.0f} s: {named}."
    state = ", stopped by a signal," if stopped else ""
    rest = ", and the others wait" if len(places) > 1 else ""
    return f"R{named[1:]}{state} has not moved for {seconds:.0f} s{rest}."


def _is_stopped(place: RankPlace) -> bool:
    """True for a process of this machine that a signal or a debugger has stopped."""
    if place.host != socket.gethostname()[:100]:
        return False
    try:
        return psutil.Process(place.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
