"""Block tables and prefix sharing. Expected numbers are worked out by hand for blocks of 4 tokens."""

from runtime.blocks import BlockManager
from tests.blocks.tables import TOKENS, add, cached


def test_a_second_sequence_shares_full_blocks() -> None:
    manager = BlockManager(16, 4)
    first, found = add(manager, TOKENS[:10])
    assert found == 0
    second, found = add(manager, TOKENS[:10])
    assert found == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert manager.num_free == 16 - 4
    manager.check_integrity()


def test_the_last_token_is_always_left_to_compute() -> None:
    manager = BlockManager(16, 4)
    add(manager, TOKENS[:8])
    assert cached(manager, TOKENS[:8]) == 4 + 3
    assert cached(manager, TOKENS[:9]) == 8
    assert cached(manager, TOKENS[:1]) == 0


def test_a_block_that_begins_alike_is_copied() -> None:
    manager = BlockManager(16, 4)
    add(manager, TOKENS[:8])
    table, _ = add(manager, [*TOKENS[:6], 7, 8, 9])
    match = manager.match([*TOKENS[:6], 7, 9, 9], manager.chain())
    assert match.blocks == tuple(table.blocks[:1])
    assert (match.num_tokens, match.start_of) == (7, table.blocks[1])
    assert manager.match([*TOKENS[:5], 7, 9], manager.chain()).num_tokens == 5
    assert manager.match([*TOKENS[:4], 7, 9], manager.chain()).start_of is None
    assert cached(manager, [*TOKENS[1:4], 7, 9]) == 0
    manager.free(table, forget=True)
    assert manager.match([*TOKENS[:6], 7, 9, 9], manager.chain()).num_tokens == 0  # it shared its first block
    manager.check_integrity()
    coarse = BlockManager(16, 8)
    add(coarse, TOKENS[:8])
    assert (cached(coarse, [100, 7, 7]), cached(coarse, [100, 101, 7])) == (0, 2)  # a token is sooner computed


def test_adapter_version_and_salt_are_part_of_the_key() -> None:
    manager = BlockManager(32, 4)
    add(manager, TOKENS)
    for adapter, salt in (("a@1", ""), ("", "tenant"), ("a@2", ""), ("", "a@1")):
        _, found = add(manager, TOKENS, adapter=adapter, salt=salt)
        assert found == 0
    assert cached(manager, TOKENS, adapter="a@1") == 16 + 3


def test_freed_blocks_are_found_again_until_evicted_and_the_start_lasts_longest() -> None:
    manager = BlockManager(5, 4)
    table, _ = add(manager, TOKENS[:17])
    manager.free(table)
    assert manager.num_free == 5
    assert cached(manager, TOKENS[:17]) == 16
    other, _ = add(manager, list(range(8)))  # takes the block without content, then the tail of the old sequence
    assert cached(manager, TOKENS[:17]) == 12
    manager.free(other)
    manager.check_integrity()


def test_a_match_in_the_free_list_does_not_count_as_room() -> None:
    manager = BlockManager(4, 4)
    table, _ = add(manager, TOKENS[:12])
    manager.free(table)
    match = manager.match(TOKENS[:12], manager.chain())
    assert match.num_tokens == 8 + 3
    assert match.num_evictable == 2  # the one to copy is not among them
    assert manager.can_adopt(match, 16)
    assert not manager.can_adopt(match, 17)


def test_forget_makes_content_unfindable() -> None:
    manager = BlockManager(8, 4)
    table, _ = add(manager, TOKENS[:12])
    manager.free(table, forget=True)
    assert cached(manager, TOKENS[:12]) == 0
    manager.check_integrity()


def test_reset_and_disabled_caching() -> None:
    manager = BlockManager(8, 4)
    held, _ = add(manager, TOKENS[:12])
    manager.reset_prefixes()
    assert cached(manager, TOKENS[:12]) == 0
    manager.free(held)
    manager.check_integrity()
    off = BlockManager(8, 4, prefix_caching=False)
    add(off, TOKENS[:12])
    assert cached(off, TOKENS[:12]) == 0


def test_usage_counts_held_blocks_only() -> None:
    manager = BlockManager(10, 4)
    table, _ = add(manager, TOKENS[:17])
    assert manager.usage == 0.5
    manager.free(table)
    assert manager.usage == 0.0
