"""What becomes of the KV of a request that loses its blocks: it is computed again, or kept in host memory."""

from dataclasses import replace
from typing import Protocol

from runtime.blocks import SwapSpace
from runtime.messages import Move
from runtime.scheduler.counts import Counts
from runtime.scheduler.entry import Entry
from runtime.scheduler.request import Request


class Keeping(Protocol):
    """Either way the request resumes with the tokens that it had."""

    @property
    def num_held(self) -> int:
        """Blocks in host memory that are kept for somebody."""

    def keep(self, request: Request) -> list[Move]:
        """It is about to lose its table. Returns what workers must copy before anybody else writes there."""

    def restore(self, request: Request, entry: Entry) -> tuple[Entry, list[Move]]:
        """It comes in again with `entry`. Returns how much is computed then, and what workers must copy for that."""

    def drop(self, request: Request) -> None:
        """It has ended, or resumed: nothing need be kept."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` when something is lost."""


class Recompute:
    """Nothing is kept. Where prefixes are cached, most of it is found again as long as nobody needs the blocks."""

    num_held = 0

    def keep(self, request: Request) -> list[Move]:
        return []

    def restore(self, request: Request, entry: Entry) -> tuple[Entry, list[Move]]:
        return entry, []

    def drop(self, request: Request) -> None:
        pass

    def check_integrity(self) -> None:
        pass


class Swap:
    """Blocks are copied to host memory as long as there is room, and back, but for those that are still cached.

    Only what is certain is kept: a step in flight may yet fail. A table of which a sliding window has passed the
    start is not: what is left of it is soon computed again.
    """

    def __init__(self, space: SwapSpace, block_size: int, counts: Counts) -> None:
        self._space = space
        self._size = block_size
        self._counts = counts

    @property
    def num_held(self) -> int:
        return self._space.num_held

    def keep(self, request: Request) -> list[Move]:
        table = request.table
        assert table is not None
        count = -(-request.num_written // self._size)
        if table.num_dropped or not 0 < count <= self._space.num_free:
            return []
        try:
            host = self._space.take(count)
        except Exception:  # then it is computed again
            return []
        request.kept, request.num_kept = host, request.num_written
        self._counts.swapped_out += count
        return [Move("out", block, target) for block, target in zip(table.blocks, host, strict=False)]

    def restore(self, request: Request, entry: Entry) -> tuple[Entry, list[Move]]:
        host = request.kept
        known = min(request.num_kept, len(request.tokens) - 1)
        if host is None or known <= entry.num_computed:
            self.drop(request)
            return entry, []
        first, end = entry.num_computed // self._size, -(-known // self._size)
        moves = [Move("in", host[number], entry.table.blocks[number]) for number in range(first, end)]
        self.drop(request)
        self._counts.swapped_in += len(moves)
        return replace(entry, num_computed=known), moves

    def drop(self, request: Request) -> None:
        if request.kept is not None:
            self._space.release(request.kept)
            request.kept, request.num_kept = None, 0

    def check_integrity(self) -> None:
        self._space.check_integrity()
