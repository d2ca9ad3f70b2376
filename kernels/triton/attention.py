"""Attention over the paged cache, with softmax in one pass (arXiv:2205.14135), split over the context.

A context is always cut at multiples of `SPLIT` tokens, each part is summed up from its beginning, and parts are put
together from the first to the last. Where a row decodes, parts are programs of their own; where it has many tokens, one
program does them all in turn. So a token's result depends neither on the batch nor on how its prompt was cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import TILE_TOKENS, PagedRows
from kernels.triton.launch import heads, power
from kernels.triton.rope import scales_of

SPLIT = 256
"""Tokens of a part of the context."""
KEYS = 32
"""Tokens of a part that are attended to at once."""
MIN_TILE = 16
"""Fewest rows and columns of a product."""


@triton.jit
def _merge(best, total, mixed, new_best, new_total, new_mixed):
    """Two parts of a context as one. best, total [M]: largest score, sum of exp(score - best); mixed [M, D]: values
    weighted so. A part in which nothing is seen has a best of -inf, and changes no bit of the other."""
    larger = tl.maximum(best, new_best)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    old, new = tl.exp(best - base), tl.exp(new_best - base)
    return larger, total * old + new_total * new, mixed * old[:, None] + new_mixed * new[:, None]


@triton.jit
def _load(cache, scales, place, at, width, inside, dim, element):
    """Tokens of a cache as [tokens, D] in the queries' type."""
    mask = inside[:, None] & (at[None, :] < dim)
    found = tl.load(cache + place[:, None] * width + at[None, :], mask=mask, other=0.0)
    if cache.dtype.element_ty == tl.int8:
        scale = tl.load(scales + place * (width // 4) + width // 4 - 1, mask=inside, other=0.0)
        found = found.to(tl.float32) * scale[:, None]
    return found.to(element)


@triton.jit
def _attend(
    queries, positions, part, end, table, k_cache, v_cache, k_scales, v_scales, kv, num_kv, dim, width,
    block_size, scale, window, softcap, M: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One part of a context, of keys before `end`: queries [M, D] at `positions` [M] → best, total, mixed."""
    at = tl.arange(0, D)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    for first in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, end), KEYS):
        key = first + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(table + key // block_size, mask=inside, other=0)
        place = (block * block_size + key % block_size) * num_kv + kv
        keys = _load(k_cache, k_scales, place, at, width, inside, dim, queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if softcap > 0.0:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        distance = positions[:, None] - key[None, :]
        seen = (distance >= 0) & (distance < window) & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(best, tl.max(scores, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(best - base)
        values = _load(v_cache, v_scales, place, at, width, inside, dim, queries.dtype)
        total = total * kept + tl.sum(weights, axis=1)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        best = larger
    return best, total, mixed


@triton.jit
def _decode(
    q, q_stride, table, table_stride, extents, k_cache, v_cache, k_scales, v_scales, bests, mixes,
    num_kv, group, dim, width, block_size, scale, window, softcap, num_parts,
    M: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One part of one row's context, for the query heads that share a key: to be merged by `_merge_splits`."""
    row, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(extents + row * 3 + 2)
    if (part * SPLIT <= position) & (part * SPLIT + SPLIT > position - window + 1):
        member, at = tl.arange(0, M), tl.arange(0, D)
        head = kv * group + member
        inside = (member[:, None] < group) & (at[None, :] < dim)
        queries = tl.load(q + row * q_stride + head[:, None] * dim + at[None, :], mask=inside, other=0.0)
        best, total, mixed = _attend(
            queries, tl.zeros([M], tl.int64) + position, part, position + 1, table + row * table_stride,
            k_cache, v_cache, k_scales, v_scales, kv, num_kv, dim, width, block_size, scale, window, softcap,
            M, D, SPLIT, KEYS,
        )  # fmt: skip
        place = (row * num_kv * group + head) * num_parts + part
        tl.store(bests + place * 2, best, mask=member < group)
        tl.store(bests + place * 2 + 1, total, mask=member < group)
        tl.store(mixes + place[:, None] * dim + at[None, :], mixed, mask=inside)


@triton.jit
def _merge_splits(bests, mixes, extents, out, num_heads, dim, window, num_parts, D: tl.constexpr, SPLIT: tl.constexpr):
    """The parts of one row and head, from the first to the last."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(extents + row * 3 + 2)
    at = tl.arange(0, D)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([1, D], tl.float32)
    one = tl.arange(0, 1)
    for part in range(tl.maximum(position - window + 1, 0) // SPLIT, position // SPLIT + 1):
        place = (row * num_heads + head) * num_parts + part
        best, total, mixed = _merge(
            best, total, mixed,
            tl.load(bests + place * 2 + one), tl.load(bests + place * 2 + 1 + one),
            tl.load(mixes + place * dim + at[None, :], mask=at[None, :] < dim, other=0.0),
        )  # fmt: skip
    found = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * num_heads + head) * dim + at[None, :], found, mask=at[None, :] < dim)


@triton.jit
def _prefill(
    q, q_stride, tiles, table, table_stride, extents, k_cache, v_cache, k_scales, v_scales, out,
    num_kv, group, dim, width, block_size, scale, window, softcap,
    TOKENS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a row with the query heads that share a key, as if those were tokens too."""
    tile, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, first = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    start, count, context = (
        tl.load(extents + row * 3), tl.load(extents + row * 3 + 1), tl.load(extents + row * 3 + 2),
    )  # fmt: skip
    member, at = tl.arange(0, M), tl.arange(0, D)
    token, head = first + member // group, kv * group + member % group
    ours = (member < TOKENS * group) & (token < count)
    inside = ours[:, None] & (at[None, :] < dim)
    queries = tl.load(
        q + (start + token)[:, None] * q_stride + head[:, None] * dim + at[None, :], mask=inside, other=0.0
    )
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    end = context + tl.minimum(first + TOKENS, count)
    for part in range(tl.maximum(context + first - window + 1, 0) // SPLIT, (end - 1) // SPLIT + 1):
        new_best, new_total, new_mixed = _attend(
            queries, context + token, part, end, table + row * table_stride,
            k_cache, v_cache, k_scales, v_scales, kv, num_kv, dim, width, block_size, scale, window, softcap,
            M, D, SPLIT, KEYS,
        )  # fmt: skip
        best, total, mixed = _merge(best, total, mixed, new_best, new_total, new_mixed)
    found = (mixed / total[:, None]).to(out.dtype.element_ty)
    place = (start + token)[:, None] * (num_kv * group) + head[:, None]
    tl.store(out + place * dim + at[None, :], found, mask=inside)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None,
    softcap: float,
) -> Tensor:
    """`Ops.paged_attention`; the new keys and values are read from the cache."""
    q = heads(q)
    _, num_heads, dim = q.shape
    num_kv, width = k_cache.shape[2:]
    group, tiles, seen = num_heads // num_kv, rows.tiles, window or 1 << 40
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cache = (k_cache, v_cache, scales_of(k_cache), scales_of(v_cache))
    options = {"D": power(dim, MIN_TILE), "SPLIT": SPLIT, "KEYS": KEYS}
    if tiles.singles:
        parts = triton.cdiv(tiles.longest, SPLIT)
        bests = torch.empty(tiles.singles, num_heads, parts, 2, device=q.device)
        mixes = torch.empty(tiles.singles, num_heads, parts, dim, device=q.device)
        _decode[(tiles.singles, num_kv, parts)](
            q, q.stride(0), rows.tables, rows.tables.stride(0), tiles.extents, *cache, bests, mixes,
            num_kv, group, dim, width, rows.block_size, scale, seen, softcap, parts,
            M=power(group, MIN_TILE), **options,
        )  # fmt: skip
        _merge_splits[(tiles.singles, num_heads)](
            bests, mixes, tiles.extents, out, num_heads, dim, seen, parts, D=options["D"], SPLIT=SPLIT
        )
    if len(tiles.tiles):
        size = power(TILE_TOKENS * group, MIN_TILE)
        _prefill[(len(tiles.tiles), num_kv)](
            q, q.stride(0), tiles.tiles, rows.tables, rows.tables.stride(0), tiles.extents, *cache, out,
            num_kv, group, dim, width, rows.block_size, scale, seen, softcap,
            TOKENS=TILE_TOKENS, M=size, num_warps=4 if size < 128 else 8, **options,
        )  # fmt: skip
    return out
