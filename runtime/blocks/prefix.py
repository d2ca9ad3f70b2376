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
        assert {block: key for key, block in self._blocks.items()} == self._keys, "index and its inverse differ"
