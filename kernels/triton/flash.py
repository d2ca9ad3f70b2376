"""Attention through the package flash-attn (arXiv:2307.08691), for rows of several tokens and for training.

`flash_attn_varlen_func`, as documented since 2.7: queries [tokens, H, D] of sequences one after the other, whose
borders are int32; keys alike, or blocks of a cache [N, B, G, D] with a table [sequences, blocks] int32, B a multiple of
256; float16 or bfloat16, D a multiple of 8 and at most 256; the causal mask ends at the last query and key of a
sequence; a window is how many keys are seen before a token, and after it.

Whether an installed package does as documented is tried out before it is used (`fault`). Needs no Triton.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from kernels.batch import PagedRows
from kernels.reference import ReferenceOps

PACKAGE = "flash_attn"
BLOCK = 256
"""Tokens of a block of a cache must be a multiple of this."""
CAPABILITY = (8, 0)
TYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
OPTIONS = {"softmax_scale", "causal", "window_size", "softcap", "deterministic", "block_table"}

Varlen = Callable[..., Tensor]


def unavailable() -> str | None:
    """Reason why the package cannot be used here, or None when it can and its results are right."""
    if find_spec(PACKAGE) is None:
        return "not installed"
    try:
        function = import_module(PACKAGE).flash_attn_varlen_func
    except Exception as error:  # made for another torch, say: any error of the import is a reason
        return f"cannot be imported: {type(error).__name__}: {error}"
    if lacking := OPTIONS - inspect.signature(function).parameters.keys():
        return f"its version has no {', '.join(sorted(lacking))}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        major, minor = capability
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, and the device has {major}.{minor}"
    return fault(FlashAttention(function), torch.device("cuda"))


def load() -> "tuple[FlashAttention | None, str]":
    """The package's attention, or None and the reason why it is `unavailable`."""
    if (reason := unavailable()) is not None:
        return None, reason
    return FlashAttention(import_module(PACKAGE).flash_attn_varlen_func), ""


class FlashAttention:
    """The function of the package, with the ops' arguments. Tensors are on the GPU."""

    def __init__(self, function: Varlen) -> None:
        self._function = function

    def takes(self, q: Tensor) -> bool:
        """True if it can take q [T, H, D]."""
        return q.dtype in TYPES and q.shape[2] % 8 == 0 and q.shape[2] <= LARGEST_HEAD

    def takes_paged(self, q: Tensor, k_cache: Tensor, rows: PagedRows) -> bool:
        """True if it can read this cache, and there are rows of several tokens."""
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
        """`Ops.paged_attention` for the rows of several tokens, the last [n, H, D] of q [T, H, D] → [n, H, D]."""
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
        """`Ops.packed_attention`, differentiable. Its backward adds up in one order: a run that continues from a
        checkpoint must end as one that was not killed."""
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


def fault(attention: FlashAttention, device: torch.device) -> str | None:
    """Reason why this attention cannot be used on a device: it raises, or differs from the reference's. A batch of two
    rows is attended to with all options, over a cache and without one."""
    block, scale, window, softcap = BLOCK, 0.3, 100, 3.0
    counts, contexts, tables = [3, 2], [0, block + 2], torch.tensor([[1, 0], [2, 3]])
    slots = torch.tensor([block, block + 1, block + 2, 3 * block + 2, 3 * block + 3])
    rows = PagedRows(slots.to(device), counts, contexts, tables.to(device), block)
    generator = torch.Generator().manual_seed(1)
    sizes = ((len(slots), 4, 64), (4, block, 2, 64), (4, block, 2, 64))
    q, keys, values = (torch.randn(size, generator=generator).to(device, torch.float16) for size in sizes)
    k, v = (stored.flatten(0, 1)[rows.slots] for stored in (keys, values))
    try:
        paged = attention.paged(q, keys, values, rows, scale, window=window, softcap=softcap)
        packed = attention.packed(q, k, v, counts, scale, window=window, softcap=softcap)
        found = torch.stack((paged, packed)).float()
    except Exception as error:  # made for another device, say, or without one of the options
        return f"does not run here: {type(error).__name__}: {error}"
    reference = ReferenceOps()
    q, k, v, keys, values = (x.float() for x in (q, k, v, keys, values))
    paged = reference.paged_attention(q, k, v, keys, values, rows, scale, window=window, softcap=softcap)
    packed = reference.packed_attention(q, k, v, counts, scale, window=window, softcap=softcap)
    expected = torch.stack((paged, packed))
    if torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        return None
    return f"its results differ from the reference's by up to {float((found - expected).abs().max()):.3g}"


def _window(window: int | None) -> tuple[int, int]:
    """From tokens that a token sees, itself included, to those before and after it; -1: all."""
    return (-1, -1) if window is None else (window - 1, 0)
