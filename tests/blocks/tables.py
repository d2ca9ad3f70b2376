"""Tables with tokens in them."""

from runtime.blocks import BlockManager, BlockTable

TOKENS = list(range(100, 120))


def add(manager: BlockManager, tokens: list[int], *, adapter: str = "", salt: str = "") -> tuple[BlockTable, int]:
    """Adopt and compute a whole sequence; returns its table and the tokens that were cached."""
    chain = manager.chain(adapter=adapter, salt=salt)
    match = manager.match(tokens, chain)
    assert manager.can_adopt(match, len(tokens))
    table = manager.adopt(match, len(tokens))
    manager.index(table, tokens, len(tokens), chain)
    return table, match.num_tokens


def cached(manager: BlockManager, tokens: list[int], *, adapter: str = "", salt: str = "") -> int:
    """How many of `tokens` could be shared."""
    return manager.match(tokens, manager.chain(adapter=adapter, salt=salt)).num_tokens
