"""The running requests and the resources that each holds (a slot in the workers' tables, and blocks), and their
preemption: which request loses its resources, and what becomes of its KV."""

from collections.abc import Iterable, ValuesView
from dataclasses import dataclass, replace
from typing import Protocol

from runtime.blocks import NO_MATCH, BlockManager, BlockTable, SwapSpace
from runtime.messages import Move, RidingRow
from runtime.scheduler.adapters import AdapterPlaces
from runtime.scheduler.pace import SchedulerCounts
from runtime.scheduler.policies import Policy
from runtime.scheduler.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks for a request that is admitted, and how many of its tokens are computed already."""

    table: BlockTable
    num_computed: int
    copies: list[tuple[int, int]]
    """(from, to) blocks to copy before the first row."""


def allocate(blocks: BlockManager, request: Request, num_tokens: int) -> Allocation | None:
    """Allocate blocks for `num_tokens` of the request; None when there is no room. Blocks of the same tokens are
    shared: with the request that it is a fork of, or through the prefix cache."""
    source = request.source
    shared = request.num_shared
    table = source.table if source is not None and source.num_written >= shared else None
    if table is not None and blocks.can_fork(table, shared, num_tokens):
        fork = blocks.fork(table, shared, num_tokens)
        return Allocation(fork.table, shared, fork.copies)
    assert request.chain is not None
    match = NO_MATCH if request.needs_every_token else blocks.match(request.tokens, request.chain)
    if not blocks.can_adopt(match, num_tokens):
        return None
    table = blocks.adopt(match, num_tokens)
    copies = [] if match.start_of is None else [(match.start_of, table.blocks[len(match.blocks)])]
    return Allocation(table, match.num_tokens, copies)


class RunningRequests:
    """A fixed number of slots. Entering and leaving take the same time wherever in the order a request is."""

    def __init__(self, blocks: BlockManager, num_slots: int, adapters: AdapterPlaces) -> None:
        self.blocks = blocks
        self._adapters = adapters
        self.riding = RidingTables(blocks)
        """Blocks of sequences in training, which every request goes before."""
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, slot: int) -> Request:
        return self._held[slot]

    @property
    def num_free(self) -> int:
        """Free slots."""
        return len(self._free)

    @property
    def full(self) -> bool:
        return not self._free

    @property
    def requests(self) -> ValuesView[Request]:
        """Running requests, in order of admission."""
        return self._held.values()

    def enter(self, request: Request, allocation: Allocation) -> None:
        request.move(RequestState.RUNNING)
        request.table = allocation.table
        request.num_computed = request.num_written = allocation.num_computed
        if request.is_branch:  # or its ancestors would live as long as it does
            request.source = None
        request.slot = slot = self._free.pop()
        self._held[slot] = request
        self._adapters.on_admission(request)

    def leave(self, request: Request, *, forget: bool = False) -> None:
        """Free slot and blocks. With `forget` the blocks leave the prefix cache."""
        assert request.table is not None
        assert request.slot is not None
        self.blocks.free(request.table, forget=forget)
        del self._held[request.slot]
        self._free.append(request.slot)
        request.table = request.slot = None
        self._adapters.on_leave(request)

    def clear(self) -> None:
        """Make every slot free again."""
        self.riding.clear()
        for request in self._held.values():
            request.table = request.slot = None
        self._held.clear()
        self._adapters.stop_running()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a slot is lost, or a request has another one than is booked."""
        self.blocks.check_integrity()
        assert sorted([*self._free, *self._held]) == list(range(self.num_slots)), "a slot is lost or held twice"
        assert all(request.slot == slot for slot, request in self._held.items()), "slots and requests differ"
        if not self._held:
            free = self.blocks.num_free + self.riding.num_held
            assert free == self.blocks.num_blocks, "blocks are held without a running request"


# -- riding sequences ------------------------------------------------------------------------------

SPARE_PART = 16
"""One in this number of blocks stays free beside those of riding sequences."""


class RidingTables:
    """Blocks of sequences in training, by the ids of `RidingRow`. No request shares them."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._tables: dict[int, BlockTable] = {}

    @property
    def num_held(self) -> int:
        """Blocks of all of them."""
        return sum(len(table.held) for table in self._tables.values())

    def holds(self, ride: int) -> bool:
        """True if what was computed of a sequence is still there."""
        return ride in self._tables

    def hold(self, row: RidingRow, num_running: int) -> BlockTable | None:
        """The table of a sequence; that of a new one is made where enough blocks stay free for `num_running` requests
        to grow. None: there is none."""
        table = self._tables.get(row.ride)
        if table is None and row.start == 0:
            blocks = self._blocks
            left = blocks.num_free - blocks.blocks_for(row.length)
            if left >= num_running + blocks.num_blocks // SPARE_PART:
                table = self._tables[row.ride] = blocks.adopt(NO_MATCH, row.length)
        return table

    def release(self, ride: int) -> None:
        """Give a sequence's blocks back. An unknown one is fine."""
        if (table := self._tables.pop(ride, None)) is not None:
            self._blocks.free(table)

    def evict(self) -> bool:
        """Give all blocks back, as a request needs some: these sequences begin again. False: there were none."""
        for ride in (held := list(self._tables)):
            self.release(ride)
        return bool(held)

    def clear(self) -> None:
        """Forget all tables, whose blocks are free already."""
        self._tables.clear()


# -- preemption ------------------------------------------------------------------------------------
#
# The KV of a preempted request: recomputed, or saved to host memory and restored.


class VictimSelection:
    """Choice of the requests to preempt: by the policy's rank, and none more often than `cap` times.

    A request at the cap is admitted only with blocks for its longest possible output, and is never preempted. So
    every request is preempted a bounded number of times and then runs to its end, and a pool of any size makes
    progress.

    A request whose hidden states are pooled is never preempted: what was pooled so far would be lost. It generates
    nothing, so it has all its blocks from the beginning.
    """

    def __init__(self, policy: Policy, cap: int) -> None:
        self._policy = policy
        self._cap = cap

    def protects(self, request: Request) -> bool:
        return request.timing.preemptions >= self._cap or request.submission.pooling is not None

    def tokens_to_hold(self, request: Request) -> int:
        """Number of tokens that a request must find blocks for to be admitted.

        Blocks for the whole prompt are allocated at once, although it may be computed in chunks: an admitted
        request can always finish its prompt, and two prompts never starve each other.
        """
        return request.max_len if self.protects(request) else len(request.tokens)

    def victim(self, running: Iterable[Request]) -> Request:
        """The request to preempt when one of `running` must grow: maybe that one itself. There is always one: a request
        that must grow is not protected, since protected ones have all their blocks."""
        return max((r for r in running if not self.protects(r)), key=self.standing)

    def outranked(self, waiting: Request, running: Iterable[Request]) -> list[Request]:
        """Running requests that `waiting` may replace, the worst ranked last."""
        policy = self._policy
        found = [r for r in running if policy.outranks(waiting, r) and not self.protects(r)]
        return sorted(found, key=self.standing)

    def standing(self, request: Request) -> tuple[float, int]:
        """Sort key for victims: the highest is preempted first."""
        return self._policy.rank(request), request.order


class PreemptionBackend(Protocol):
    """Treatment of the KV of preempted requests. The request resumes with the tokens that it had."""

    @property
    def num_held(self) -> int:
        """Blocks in host memory that hold saved KV."""

    def save(self, request: Request) -> list[Move]:
        """Save the KV of a request that is about to lose its table.

        Returns the copies that workers must make before its blocks are written again.
        """

    def restore(self, request: Request, allocation: Allocation) -> tuple[Allocation, list[Move]]:
        """Use the saved KV for a request that is admitted again with `allocation`.

        Returns the allocation with the tokens that count as computed then, and the copies that workers must make.
        """

    def drop(self, request: Request) -> None:
        """Release the saved KV of a request that has ended or resumed."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a block is lost."""


class Recompute:
    """Save nothing. With prefix caching most of the KV is found again, until its blocks are reused."""

    num_held = 0

    def save(self, request: Request) -> list[Move]:
        return []

    def restore(self, request: Request, allocation: Allocation) -> tuple[Allocation, list[Move]]:
        return allocation, []

    def drop(self, request: Request) -> None:
        pass

    def check_integrity(self) -> None:
        pass


class Swap:
    """Copy blocks to host memory while there is room, and back, except blocks that are still cached.

    Only committed tokens are saved: a step in flight may yet fail. A table of which a sliding window has passed
    the start is not saved: what is left of it is soon recomputed.
    """

    def __init__(self, space: SwapSpace, block_size: int, counts: SchedulerCounts) -> None:
        self._space = space
        self._size = block_size
        self._counts = counts

    @property
    def num_held(self) -> int:
        return self._space.num_held

    def save(self, request: Request) -> list[Move]:
        table = request.table
        assert table is not None
        count = -(-request.num_written // self._size)
        if table.num_dropped or not 0 < count <= self._space.num_free:
            return []
        try:
            host = self._space.take(count)
        except Exception:  # then it is recomputed
            return []
        request.saved_blocks, request.num_saved = host, request.num_written
        self._counts.swapped_out += count
        return [Move("out", block, target) for block, target in zip(table.blocks, host, strict=False)]

    def restore(self, request: Request, allocation: Allocation) -> tuple[Allocation, list[Move]]:
        host = request.saved_blocks
        known = min(request.num_saved, len(request.tokens) - 1)
        if host is None or known <= allocation.num_computed:
            self.drop(request)
            return allocation, []
        first, end = allocation.num_computed // self._size, -(-known // self._size)
        moves = [Move("in", host[number], allocation.table.blocks[number]) for number in range(first, end)]
        self.drop(request)
        self._counts.swapped_in += len(moves)
        return replace(allocation, num_computed=known), moves

    def drop(self, request: Request) -> None:
        if request.saved_blocks is not None:
            self._space.release(request.saved_blocks)
            request.saved_blocks, request.num_saved = None, 0

    def check_integrity(self) -> None:
        self._space.check_integrity()
