"""What a waiting request can begin with: blocks of the same tokens beside it, or of the same start before it."""

from dataclasses import dataclass

from runtime.blocks import BlockManager, BlockTable
from runtime.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Entry:
    """A table for a request that comes in, and how much of it is computed already."""

    table: BlockTable
    num_computed: int
    copies: list[tuple[int, int]]
    """(from, to) blocks to copy before the first row."""


def take_entry(blocks: BlockManager, request: Request, num_tokens: int) -> Entry | None:
    """Blocks for `num_tokens` of the request, shared as far as possible; None when there is no room."""
    source = request.source
    shared = request.num_shared
    table = source.table if source is not None and source.num_written >= shared else None
    if table is not None and blocks.can_fork(table, shared, num_tokens):
        fork = blocks.fork(table, shared, num_tokens)
        return Entry(fork.table, shared, fork.copies)
    assert request.chain is not None
    match = blocks.match(request.tokens, request.chain)
    if not blocks.can_adopt(match, num_tokens):
        return None
    table = blocks.adopt(match, num_tokens)
    copies = [] if match.start_of is None else [(match.start_of, table.blocks[len(match.blocks)])]
    return Entry(table, match.num_tokens, copies)
