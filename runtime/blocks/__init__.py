"""Paged KV memory in whole blocks of tokens: who holds which block, and what can be found in it again.

`BlockManager` is the way in. Deals in ints only: it knows neither tensors nor requests.
"""

from runtime.blocks.manager import BlockManager
from runtime.blocks.pool import BlockPool
from runtime.blocks.prefix import KeyChain, PrefixIndex, PrefixKey
from runtime.blocks.swap import SwapSpace
from runtime.blocks.table import BlockTable, Fork, PrefixMatch

__all__ = [
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
