"""Those that run, and what each of them holds: a slot in the workers' tables, and blocks."""

from collections.abc import ValuesView

from runtime.blocks import BlockManager
from runtime.scheduler.entry import Entry
from runtime.scheduler.request import Request, State


class Running:
    """A fixed number of slots. Entering and leaving take the same time wherever in the order a request is."""

    def __init__(self, blocks: BlockManager, num_slots: int) -> None:
        self._blocks = blocks
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, slot: int) -> Request:
        return self._held[slot]

    @property
    def full(self) -> bool:
        return not self._free

    @property
    def requests(self) -> ValuesView[Request]:
        """In order of admission."""
        return self._held.values()

    def enter(self, request: Request, entry: Entry) -> None:
        request.move(State.RUNNING)
        request.table = entry.table
        request.num_computed = request.num_written = entry.num_computed
        if request.is_branch:  # or its ancestors would live as long as it does
            request.source = None
        request.slot = slot = self._free.pop()
        self._held[slot] = request

    def leave(self, request: Request, *, forget: bool = False) -> None:
        """Take slot and blocks back. With `forget` nobody is to find what was computed."""
        assert request.table is not None
        assert request.slot is not None
        self._blocks.free(request.table, forget=forget)
        del self._held[request.slot]
        self._free.append(request.slot)
        request.table = request.slot = None

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a slot is lost, or a request thinks that it has another one."""
        self._blocks.check_integrity()
        assert sorted([*self._free, *self._held]) == list(range(self.num_slots)), "a slot is lost or held twice"
        assert all(request.slot == slot for slot, request in self._held.items()), "slots and requests differ"
        if not self._held:
            assert self._blocks.num_free == self._blocks.num_blocks, "blocks are held by nobody"
