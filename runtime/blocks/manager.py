"""Block tables: the blocks that a sequence holds, and the computed blocks that it can share.

Check/act pairs: `match` then `adopt`, `can_grow` then `grow`, `can_fork` then `fork`. Tables only ever grow
at the end, and are given back whole, or from the start where a sliding window has passed. A call that raises
changes nothing. Deals in tokens and tables, not in requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.blocks.pool import BlockPool, KeyChain, PrefixIndex

# -- table -----------------------------------------------------------------------------------------
#
# Data types of the block manager: the blocks that a sequence holds, and the blocks that it can share.


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order of position. Owned by the manager; others only read it."""

    blocks: list[int] = field(default_factory=list)
    """Block ids by position. Those of the first `num_dropped` are no longer this sequence's."""
    num_indexed: int = 0
    """Blocks from the start that were offered to the prefix index, or came out of it."""
    num_dropped: int = 0
    """Blocks from the start that were given back because a sliding window has passed them."""

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_dropped :]


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The blocks that a new sequence can share. Valid until the pool next changes."""

    blocks: tuple[int, ...]
    num_tokens: int
    """Tokens in `blocks`, and tokens in common with `start_of`."""
    start_of: int | None
    """A block that has its first tokens in common with the sequence's next one, and is to be copied there."""
    num_evictable: int
    """Number of `blocks` in the free list, which leave it when they are adopted."""


NO_MATCH = PrefixMatch((), 0, None, 0)
"""No blocks to share."""


@dataclass(frozen=True, slots=True)
class Fork:
    """A second table over the same first tokens, and what must be copied before it is used."""

    table: BlockTable
    copies: list[tuple[int, int]]
    """(from, to) block ids: the one block that was filled in part, if there is one."""


class BlockManager:
    """The pool, the index and the tables of one KV cache."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._least_copied = max(1, block_size // 4)
        """Tokens: to copy a block takes about as long as to compute one."""
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._tables: dict[int, BlockTable] = {}

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that some sequence holds, from 0 to 1."""
        return self._pool.num_held / self._pool.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def chain(self, *, adapter: str = "", salt: str = "") -> KeyChain:
        """The keys of a new sequence's blocks. `adapter` is an adapter version."""
        return KeyChain(self.block_size, adapter=adapter, salt=salt)

    # -- a new table ---------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], chain: KeyChain) -> PrefixMatch:
        """The longest run of indexed blocks at the start of `tokens`, and a block whose first tokens continue it.

        Always leaves at least the last token to compute: the caller needs its logits.
        """
        if not self.prefix_caching:
            return NO_MATCH
        blocks: list[int] = []
        known = len(tokens) - 1
        count = known // self.block_size
        for key in chain.keys(tokens, count)[:count]:
            block = self._index.find(key)
            if block is None:
                break
            blocks.append(block)
        start = len(blocks) * self.block_size
        rest = tokens[start : min(start + self.block_size, known)]
        start_of, common = self._index.find_start(chain.parent(len(blocks)), rest)
        if common < self._least_copied:
            start_of, common = None, 0
        return PrefixMatch(tuple(blocks), start + common, start_of, sum(map(self._pool.is_free, blocks)))

    def can_adopt(self, match: PrefixMatch, num_tokens: int) -> bool:
        """True if there is room for a new table of `num_tokens` that begins with `match`."""
        fresh = self.blocks_for(num_tokens) - len(match.blocks)
        return fresh <= self._pool.num_free - match.num_evictable

    def adopt(self, match: PrefixMatch, num_tokens: int) -> BlockTable:
        """A new table: the matched blocks, then fresh ones up to `num_tokens`, into the first of which the match's
        `start_of` is to be copied before anything is written. Needs `can_adopt`."""
        return self._share(BlockTable(list(match.blocks), len(match.blocks)), num_tokens)

    def can_fork(self, source: BlockTable, num_shared: int, num_tokens: int) -> bool:
        """True if a new table of `num_tokens` can share the first `num_shared` with `source`: `source` still has them
        all, and there is room for the rest."""
        fresh = self.blocks_for(num_tokens) - num_shared // self.block_size
        return source.num_dropped == 0 and fresh <= self._pool.num_free

    def fork(self, source: BlockTable, num_shared: int, num_tokens: int) -> Fork:
        """A new table whose first `num_shared` tokens are those of `source`, computed already.

        Full blocks are shared; one that is filled in part is copied, because both sequences continue to write into it.
        Needs `can_fork`.
        """
        full, rest = divmod(num_shared, self.block_size)
        table = BlockTable(source.blocks[:full], full)
        self._share(table, num_tokens)
        return Fork(table, [(source.blocks[full], table.blocks[full])] if rest else [])

    def _share(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """Hold the blocks that are in `table` already, and grow it; undone when that raises."""
        for block in table.held:
            self._pool.hold(block)
        self._tables[id(table)] = table
        try:
            self.grow(table, num_tokens)
        except BaseException:
            self.free(table)
            raise
        return table

    # -- a table's life ------------------------------------------------------------------------

    def can_grow(self, table: BlockTable, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) - len(table.blocks) <= self._pool.num_free

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Append fresh blocks until the table holds `num_tokens`. Needs `can_grow`."""
        before = len(table.blocks)
        try:
            for _ in range(self.blocks_for(num_tokens) - before):
                block = self._pool.take()
                self._index.discard(block)
                table.blocks.append(block)
        except BaseException:
            while len(table.blocks) > before:
                self._pool.release(table.blocks.pop(), reusable=False)
            raise

    def index(self, table: BlockTable, tokens: Sequence[int], num_computed: int, chain: KeyChain) -> None:
        """Make the full blocks among the first `num_computed` tokens findable, now that their KV is written."""
        full = num_computed // self.block_size
        if full <= table.num_indexed or not self.prefix_caching:
            return
        keys = chain.keys(tokens, full)
        for number in range(max(table.num_indexed, table.num_dropped), full):
            start = number * self.block_size
            block, content = table.blocks[number], tokens[start : start + self.block_size]
            self._index.add(keys[number], block, chain.parent(number), content)
        table.num_indexed = full

    def drop_behind(self, table: BlockTable, position: int) -> None:
        """Give back the blocks of which every token lies before `position`: no query will look there again.

        They stay findable until they are needed, like all that is freed.
        """
        passed = max(position, 0) // self.block_size
        for block in table.blocks[table.num_dropped : passed]:
            self._pool.release(block, reusable=block in self._index)
        table.num_dropped = max(table.num_dropped, passed)

    def free(self, table: BlockTable, *, forget: bool = False) -> None:
        """Give every block back, tail first, so that the start of a sequence stays findable longest.

        With `forget` the content is not to be found again (it may be garbage after a failed step).
        """
        del self._tables[id(table)]
        if forget:
            self.forget(table)
        for block in reversed(table.held):
            self._pool.release(block, reusable=block in self._index)

    def forget(self, table: BlockTable) -> None:
        """Remove from the index what the blocks of a table hold, or held when it was freed."""
        for block in table.held:
            self._index.discard(block)

    def reset_prefixes(self) -> int:
        """Forget all cached prefixes; running sequences keep their blocks. Returns the number of blocks that were
        indexed."""
        count = len(self._index)
        self._index.clear()
        return count

    def clear(self) -> None:
        """Make every block free again and forget all prefixes. No table that was handed out may be used after."""
        self._pool = BlockPool(self._pool.num_blocks)
        self._index.clear()
        self._tables.clear()

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a block is lost, held twice without two tables, or wrongly indexed."""
        self._pool.check_integrity(table.held for table in self._tables.values())
        self._index.check_integrity()
