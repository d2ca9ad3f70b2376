"""Paged KV memory in whole blocks of tokens: the sequences that hold each block, and the prefixes that can be found
again.

`BlockManager` is the entry point. Deals in ints only, not in tensors or requests.
"""

from runtime.blocks.manager import NO_MATCH, BlockManager, BlockTable, Fork, PrefixMatch
from runtime.blocks.pool import BlockPool, KeyChain, PrefixIndex, PrefixKey, SwapSpace

__all__ = [
    "NO_MATCH",
    "BlockManager",
    "BlockPool",
    "BlockTable",
    "Fork",
    "KeyChain",
    "PrefixIndex",
    "PrefixKey",
    "PrefixMatch",
    "SwapSpace",
]
