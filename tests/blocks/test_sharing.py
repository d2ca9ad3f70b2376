"""Forks, sliding windows, eviction by last use, and allocations that fail. Blocks of 4 tokens, worked out by hand."""

import pytest

from runtime.blocks import BlockManager, BlockTable
from runtime.support import failpoints
from tests.blocks.tables import TOKENS, add, cached


def test_a_fork_shares_full_blocks_and_copies_the_one_that_is_filled_in_part() -> None:
    manager = BlockManager(16, 4)
    source, _ = add(manager, TOKENS[:10])
    fork = manager.fork(source, 9, 10)
    assert fork.table.blocks[:2] == source.blocks[:2]
    assert fork.copies == [(source.blocks[2], fork.table.blocks[2])]
    assert manager.num_free == 16 - 4
    manager.free(source)
    manager.check_integrity()
    assert manager.num_free == 16 - 3
    manager.free(fork.table)
    manager.check_integrity()


@pytest.mark.parametrize(("shared", "fresh", "copies"), [(8, 1, 0), (7, 2, 1), (0, 3, 0), (3, 3, 1)])
def test_a_fork_takes_what_it_cannot_share(shared: int, fresh: int, copies: int) -> None:
    manager = BlockManager(16, 4)
    source, _ = add(manager, TOKENS[:10])
    before = manager.num_free
    fork = manager.fork(source, shared, 10)
    assert before - manager.num_free == fresh
    assert len(fork.copies) == copies


def test_can_fork_counts_only_fresh_blocks() -> None:
    manager = BlockManager(4, 4)
    source, _ = add(manager, TOKENS[:10])
    assert manager.can_fork(source, 9, 10)
    assert not manager.can_fork(source, 9, 13)
    assert not manager.can_fork(source, 7, 10)


def test_a_window_that_has_passed_gives_blocks_back() -> None:
    manager = BlockManager(8, 4)
    table, _ = add(manager, TOKENS)  # five blocks
    manager.drop_behind(table, 3)
    assert manager.num_free == 3
    manager.drop_behind(table, 9)
    assert (manager.num_free, table.num_dropped) == (5, 2)
    manager.drop_behind(table, 4)  # never backwards
    manager.drop_behind(table, -5)
    assert table.num_dropped == 2
    manager.check_integrity()
    assert cached(manager, TOKENS) == 16 + 3  # findable until it is needed
    assert not manager.can_fork(table, 19, 20)  # its start is not its own any more
    manager.grow(table, 24)
    manager.free(table)
    assert manager.num_free == 8
    manager.check_integrity()


def test_dropping_a_shared_block_leaves_it_to_the_others() -> None:
    manager = BlockManager(8, 4)
    first, _ = add(manager, TOKENS[:10])
    second, _ = add(manager, TOKENS[:10])
    manager.drop_behind(first, 8)
    assert second.blocks[0] not in (manager._pool._free)
    manager.check_integrity()


def test_eviction_takes_the_least_recently_used_first() -> None:
    manager = BlockManager(6, 4)
    prompts = [[n] * 5 for n in range(3)]  # one full block each, and one filled in part
    for prompt in prompts:
        manager.free(add(manager, prompt)[0])
    manager.free(add(manager, prompts[0])[0])  # used again: now the second is the oldest
    held: list[BlockTable] = []
    evicted = []
    while len(evicted) < 3:
        held.append(add(manager, [90 + len(held)] * 4)[0])
        evicted += [n for n in range(3) if n not in evicted and not cached(manager, prompts[n])]
    assert evicted == [1, 2, 0]
    assert len(held) == 6  # the blocks without content went before any of these


def test_growing_is_all_or_nothing() -> None:
    manager = BlockManager(8, 4)
    table, _ = add(manager, TOKENS[:5])
    match = manager.match(TOKENS[:17], manager.chain())
    for at in (1, 2, 3):
        for attempt in (lambda: manager.grow(table, 20), lambda: manager.adopt(match, 17)):
            failpoints.configure(f"blocks.take=raise:{at}")
            try:
                with pytest.raises(failpoints.FailpointError):
                    attempt()
            finally:
                failpoints.configure("")
            assert len(table.blocks) == 2
            assert manager.num_free == 6
            manager.check_integrity()
