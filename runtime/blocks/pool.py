"""Ref-counted block ids. Does not know what is in a block, only how many hold it."""

from collections import OrderedDict
from collections.abc import Iterable

from runtime.failpoints import failpoint


class BlockPool:
    """`num_blocks` ids; the free ones in the order in which they will be handed out.

    A free block may still hold KV that the prefix index knows, so the free list is also the
    eviction order: blocks without reusable content in front, then least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def take(self) -> int:
        """The next free block, held once. The caller has checked `num_free` and evicts its old content."""
        failpoint("blocks.take")
        block, _ = self._free.popitem(last=False)
        self._refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a block, which may be a free one that still has its content."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def release(self, block: int, *, reusable: bool) -> None:
        """One holder fewer. Without holders the block is free; `reusable` content is evicted last."""
        assert self._refs[block] > 0, f"block {block} released more often than held"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            if not reusable:
                self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise `AssertionError` unless the reference counts are exactly those of `tables`, and the rest is free."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert self._refs == expected, "reference counts do not match the block tables"
        free = {block for block, refs in enumerate(expected) if refs == 0}
        assert set(self._free) == free, "the free list does not hold exactly the blocks without holders"
