"""The prefix index: from what made a block's KV to the block that has it.

A full block is named by a chain hash over everything that its KV depends on: the adapter version,
the cache salt, and every token from the start of the sequence to the end of the block. Fields are
tagged and length-prefixed, so no two different histories can spell the same bytes.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

PrefixKey = bytes
"""16 bytes; equal keys mean equal KV."""


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
        """For another sequence that begins with all tokens of this one."""
        other = object.__new__(KeyChain)
        other._size, other._root, other._keys = self._size, self._root, list(self._keys)
        return other

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
        self._keys: dict[int, PrefixKey] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, key: PrefixKey) -> int | None:
        return self._blocks.get(key)

    def add(self, key: PrefixKey, block: int) -> None:
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def discard(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    def clear(self) -> None:
        self._blocks.clear()
        self._keys.clear()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless each key has one block and each block one key."""
        assert {block: key for key, block in self._blocks.items()} == self._keys, "index and its inverse differ"
