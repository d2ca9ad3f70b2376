"""Ref-counted block ids, and the index that finds a block by what made its content. Holds no content of blocks."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from runtime.support.failpoints import failpoint


class BlockPool:
    """`num_blocks` ids; the free ones in the order in which they will be handed out.

    A free block may still hold KV that the prefix index has, so the free list is also the
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
        """Add a holder to a block, which may be a free one that still has its content."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def release(self, block: int, *, reusable: bool) -> None:
        """Remove a holder. Without holders the block is free; `reusable` content is evicted last."""
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


# -- swap ------------------------------------------------------------------------------------------
#
# Block ids of a second pool, in host memory: where sequences that gave up their blocks keep what was computed.


class SwapSpace:
    """`num_blocks` ids, each held by at most one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._held: dict[int, list[int]] = {}
        """Blocks by the `id()` of the list that was handed out."""

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int]:
        """`count` blocks, of at most `num_free`. What raises leaves everything as it was."""
        blocks: list[int] = []
        try:
            while len(blocks) < count:
                blocks.append(self._pool.take())
        except BaseException:
            for block in blocks:
                self._pool.release(block, reusable=False)
            raise
        self._held[id(blocks)] = blocks
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give back what `take` returned."""
        del self._held[id(blocks)]
        for block in blocks:
            self._pool.release(block, reusable=False)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a block is lost or held twice."""
        self._pool.check_integrity(self._held.values())


# -- prefixes --------------------------------------------------------------------------------------
#
# The prefix index: from the history of a block's KV to the block that holds it.
#
# A full block is named by a chain hash over everything that its KV depends on: the adapter version,
# the cache salt, and every token from the start of the sequence to the end of the block. Fields are
# tagged and length-prefixed, so no two different histories can spell the same bytes.


PrefixKey = bytes
"""16 bytes; equal keys mean equal KV."""

CANDIDATES = 8
"""Blocks after the same history that are looked at for the longest common start, the newest first."""


def root_key(adapter: str, salt: str) -> PrefixKey:
    """The parent of a sequence's first block."""
    digest = blake2b(digest_size=16, person=b"eft-kv-root")
    for tag, value in ((b"a", adapter), (b"s", salt)):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return digest.digest()


def block_key(parent: PrefixKey, tokens: Sequence[int]) -> PrefixKey:
    """The key of a block that holds `tokens` after the history named by `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16, person=b"eft-kv-block").digest()


class KeyChain:
    """The keys of one sequence's full blocks. Each is computed once, however often a prompt that waits is looked up."""

    __slots__ = ("_keys", "_root", "_size")

    def __init__(self, block_size: int, *, adapter: str = "", salt: str = "") -> None:
        self._size = block_size
        self._root = root_key(adapter, salt)
        self._keys: list[PrefixKey] = []

    def copy(self) -> "KeyChain":
        """A copy for another sequence that begins with all tokens of this one."""
        other = object.__new__(KeyChain)
        other._size, other._root, other._keys = self._size, self._root, list(self._keys)
        return other

    def parent(self, number: int) -> PrefixKey:
        """Key of the history before block `number`. The keys up to there are computed already."""
        return self._keys[number - 1] if number else self._root

    def keys(self, tokens: Sequence[int], count: int) -> list[PrefixKey]:
        """The keys of the first `count` blocks of `tokens`, and maybe of more. Tokens only ever grow at the end."""
        keys, size = self._keys, self._size
        for start in range(len(keys) * size, count * size, size):
            keys.append(block_key(keys[-1] if keys else self._root, tokens[start : start + size]))
        return keys


class PrefixIndex:
    """Key to block and back. At most one block a key: a block table is append-only, so a block
    whose content turns out to exist already keeps its place in its table and just stays unindexed."""

    def __init__(self) -> None:
        self._blocks: dict[PrefixKey, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._after: dict[PrefixKey, dict[int, None]] = {}
        """The blocks that come after a history, the newest at the end."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def find(self, key: PrefixKey) -> int | None:
        return self._blocks.get(key)

    def find_start(self, parent: PrefixKey, tokens: Sequence[int]) -> tuple[int | None, int]:
        """After the history `parent`, a block that has as many as possible of its first tokens in common with
        `tokens`, and how many. It is not looked for among more than `CANDIDATES`."""
        best, longest = None, 0
        for block in islice(reversed(self._after.get(parent, {})), CANDIDATES):
            common = _common(self._entries[block].tokens, tokens)
            if common > longest:
                best, longest = block, common
        return best, longest

    def add(self, key: PrefixKey, block: int, parent: PrefixKey, tokens: Sequence[int]) -> None:
        """`block` holds `tokens` after the history `parent`."""
        if key not in self._blocks and block not in self._entries:
            self._blocks[key] = block
            self._entries[block] = _Entry(key, parent, array("q", tokens))
            self._after.setdefault(parent, {})[block] = None

    def discard(self, block: int) -> None:
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        del self._blocks[entry.key]
        siblings = self._after[entry.parent]
        del siblings[block]
        if not siblings:
            del self._after[entry.parent]

    def clear(self) -> None:
        self._blocks.clear()
        self._entries.clear()
        self._after.clear()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless each key has one block and each block one key."""
        assert {block: entry.key for block, entry in self._entries.items()} == {
            block: key for key, block in self._blocks.items()
        }, "index and its inverse differ"
        after = {(parent, block) for parent, blocks in self._after.items() for block in blocks}
        assert after == {(entry.parent, block) for block, entry in self._entries.items()}, "a block follows nothing"


class _Entry(NamedTuple):
    key: PrefixKey
    parent: PrefixKey
    tokens: "array[int]"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
