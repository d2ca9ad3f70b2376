"""The nouns of the block manager: what a sequence holds, and what it could share."""

from dataclasses import dataclass, field


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
    """Those in `blocks`, and those in common with `start_of`."""
    start_of: int | None
    """A block that has its first tokens in common with the sequence's next one, and is to be copied there."""
    num_evictable: int
    """How many of `blocks` lie in the free list, and leave it when they are adopted."""


@dataclass(frozen=True, slots=True)
class Fork:
    """A second table over the same first tokens, and what must be copied before it is used."""

    table: BlockTable
    copies: list[tuple[int, int]]
    """(from, to) block ids: the one block that was filled in part, if there is one."""
