"""Attention through the package flash-attn (arXiv:2307.08691), for rows of several tokens and for training.

`flash_attn_varlen_func`, as documented since 2.7: queries [tokens, H, D] of sequences one after the other, whose
borders are int32; keys alike, or blocks of a cache [N, B, G, D] with a table [sequences, blocks] int32, B a multiple of
256; float16 or bfloat16, D a multiple of 8 and at most 256; the causal mask ends at the last query and key of a
sequence; a window is how many keys are seen before a token, and after it. Knows no Triton, and has not run on a GPU.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from kernels.interface import PagedRows

PACKAGE = "flash_attn"
BLOCK = 256
"""Blocks of a cache have a multiple of so many tokens."""
CAPABILITY = (8, 0)
TYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
OPTIONS = {"softmax_scale", "causal", "window_size", "softcap", "deterministic", "block_table"}

Varlen = Callable[..., Tensor]


def unavailable() -> str | None:
    """Why the package cannot be used here, or None when it can."""
    if find_spec(PACKAGE) is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        major, minor = capability
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, and the device has {major}.{minor}"
    try:
        function = import_module(PACKAGE).flash_attn_varlen_func
    except Exception as error:  # made for another torch, say: whatever breaks the import is the reason
        return f"cannot be imported: {type(error).__name__}: {error}"
    lacking = OPTIONS - inspect.signature(function).parameters.keys()
    return f"its version has no {', '.join(sorted(lacking))}" if lacking else None


def load() -> "FlashAttention | None":
    """What `unavailable` allows."""
    return FlashAttention(import_module(PACKAGE).flash_attn_varlen_func) if unavailable() is None else None


class FlashAttention:
    """The function of the package, as the ops want it. Tensors are on the GPU."""

    def __init__(self, function: Varlen) -> None:
        self._function = function

    def takes(self, q: Tensor) -> bool:
        """q [T, H, D]."""
        return q.dtype in TYPES and q.shape[2] % 8 == 0 and q.shape[2] <= LARGEST_HEAD

    def takes_paged(self, q: Tensor, k_cache: Tensor, rows: PagedRows) -> bool:
        """Whether it can read this cache, and there are rows of several tokens."""
        there = rows.tiles.singles < len(rows.counts)
        return there and k_cache.dtype is q.dtype and rows.block_size % BLOCK == 0 and self.takes(q)

    def paged(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        *,
        window: int | None,
        softcap: float,
    ) -> Tensor:
        """`Ops.paged_attention` for the rows of several tokens: of q [T, H, D] those are the last [n, H, D] → the
        same."""
        several = rows.several
        return self._function(
            q[several.first :],
            k_cache,
            v_cache,
            several.query_ends,
            several.key_ends,
            several.most_queries,
            several.most_keys,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap,
            block_table=several.tables,
        )

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        scale: float,
        *,
        window: int | None,
        softcap: float,
    ) -> Tensor:
        """`Ops.packed_attention`, differentiable. Its backward adds up in one order: a run that goes on from a
        checkpoint must end as the one that was not killed."""
        ends = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32).to(q.device, non_blocking=True)
        longest = max(lengths)
        return self._function(
            q,
            k,
            v,
            ends,
            ends,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap,
            deterministic=True,
        )


def _window(window: int | None) -> tuple[int, int]:
    """From tokens that a token sees, itself included, to those before and after it; -1: all."""
    return (-1, -1) if window is None else (window - 1, 0)
