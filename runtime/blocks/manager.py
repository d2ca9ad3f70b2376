"""Block tables: which blocks a sequence holds, and which it can share with what was computed before.

Ask/act pairs: `match` then `adopt`, `can_grow` then `grow`. Tables only ever grow at the end, and
are given back whole. Does not know requests, only tokens and tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.blocks.pool import BlockPool
from runtime.blocks.prefix import PrefixIndex, PrefixKey, block_key, root_key


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order of position. Owned by the manager; others only read it."""

    key: PrefixKey
    """Chain key of the last indexed (or adopted) block."""
    blocks: list[int] = field(default_factory=list)
    num_keyed: int = 0
    """Blocks from the start whose chain key is known."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The blocks that a new sequence can share. Valid until the pool next changes."""

    blocks: tuple[int, ...]
    key: PrefixKey
    num_tokens: int
    num_evictable: int
    """How many of `blocks` lie in the free list, and leave it when they are adopted."""


class BlockManager:
    """The pool, the index and the tables of one KV cache."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
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

    def match(self, tokens: Sequence[int], *, adapter: str, salt: str) -> PrefixMatch:
        """The longest run of known blocks at the start of `tokens`.

        Always leaves at least the last token to compute: its logits are what the caller wants.
        """
        key = root_key(adapter, salt)
        blocks: list[int] = []
        if self.prefix_caching:
            for end in range(self.block_size, len(tokens), self.block_size):
                next_key = block_key(key, tokens[end - self.block_size : end])
                block = self._index.find(next_key)
                if block is None:
                    break
                key = next_key
                blocks.append(block)
        evictable = sum(map(self._pool.is_free, blocks))
        return PrefixMatch(tuple(blocks), key, len(blocks) * self.block_size, evictable)

    def can_adopt(self, match: PrefixMatch, num_tokens: int) -> bool:
        """Is there room for a new table of `num_tokens` that begins with `match`?"""
        fresh = self.blocks_for(num_tokens) - len(match.blocks)
        return fresh <= self._pool.num_free - match.num_evictable

    def adopt(self, match: PrefixMatch, num_tokens: int) -> BlockTable:
        """A new table: the matched blocks, then fresh ones up to `num_tokens`. Needs `can_adopt`."""
        table = BlockTable(match.key, list(match.blocks), len(match.blocks))
        for block in match.blocks:
            self._pool.hold(block)
        self._tables[id(table)] = table
        try:
            self.grow(table, num_tokens)
        except BaseException:
            self.free(table)
            raise
        return table

    def can_grow(self, table: BlockTable, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) - len(table.blocks) <= self._pool.num_free

    def grow(self, table: BlockTable, num_tokens: int) -> list[int]:
        """Append fresh blocks until the table holds `num_tokens`; returns the new ones. Needs `can_grow`."""
        fresh: list[int] = []
        for _ in range(self.blocks_for(num_tokens) - len(table.blocks)):
            block = self._pool.take()
            self._index.discard(block)
            table.blocks.append(block)
            fresh.append(block)
        return fresh

    def index(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first `num_computed` tokens findable, now that their KV is written."""
        if not self.prefix_caching:
            return
        size = self.block_size
        while (table.num_keyed + 1) * size <= num_computed:
            start = table.num_keyed * size
            table.key = block_key(table.key, tokens[start : start + size])
            self._index.add(table.key, table.blocks[table.num_keyed])
            table.num_keyed += 1

    def free(self, table: BlockTable, *, forget: bool = False) -> None:
        """Give every block back, tail first, so that the start of a sequence stays findable longest.

        With `forget` the content is not to be found again (it may be garbage after a failed step).
        """
        del self._tables[id(table)]
        while table.blocks:
            block = table.blocks.pop()
            if forget:
                self._index.discard(block)
            self._pool.release(block, reusable=block in self._index)

    def reset_prefixes(self) -> None:
        """Forget all cached prefixes; running sequences keep their blocks."""
        self._index.clear()

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a block is lost, held twice without two tables, or wrongly indexed."""
        self._pool.check_integrity(table.blocks for table in self._tables.values())
        self._index.check_integrity()
