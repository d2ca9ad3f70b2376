"""Paged attention and what comes before it in C++ against the reference, in every variant; and that a row's result is
the same bits whatever its batch, its chunks and the threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cache
from kernels.cpu import CpuOps
from kernels.cpu.variants import Variant, usable_variants
from tests.kernels.paged import Paged, chunks

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.int8: 4e-2}

variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)
heads_of = st.sampled_from([(1, 1), (9, 3), (8, 1), (3, 3), (14, 2), (71, 1)])
dims = st.sampled_from([2, 6, 16, 50, 64, 80, 96, 128, 256])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
windows = st.sampled_from([None, 1, 5, 64, 100, 5000])
softcaps = st.sampled_from([0.0, 0.0, 0.5, 30.0])


@variants
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1, 7, 63, 64, 65, 127, 128, 200, 600]), st.sampled_from([1, 1, 2, 11, 40])),
        max_size=5,
    ),
    heads=heads_of,
    dim=dims,
    turned=st.sampled_from([1.0, 0.5, 0.25]),
    dtype=dtypes,
    window=windows,
    softcap=softcaps,
    seed=st.integers(0, 999),
)
def test_rope_cache_and_attention(
    variant: Variant,
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    turned: float,
    dtype: torch.dtype,
    window: int | None,
    softcap: float,
    seed: int,
) -> None:
    """Decode and chunks mixed, over blocks in random order, in a fused qkv as the decoder hands it over."""
    rows = sorted(rows, key=lambda row: (row[1] > 1, row[0] if row[1] == 1 else 0))
    num_heads, num_kv = heads
    stored = Paged.random([context + count for context, count in rows], num_kv, dim, dtype, seed)
    paged = stored.rows(rows)
    generator = torch.Generator().manual_seed(seed)
    tokens = len(paged.slots)
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv) * dim, generator=generator)
    angles = torch.randn(tokens, int(dim * turned) // 2, generator=generator)
    results = []
    for ops in (CpuOps(variant), REFERENCE):
        keys, values = stored.keys.clone(), stored.values.clone()
        q, k, v = torch.split(qkv.clone().view(tokens, num_heads + 2 * num_kv, dim), [num_heads, num_kv, num_kv], dim=1)
        q, k = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), keys, values, paged.slots)
        seen = (cache.read(keys, torch.float32), cache.read(values, torch.float32))
        mixed = ops.paged_attention(q, k, v, keys, values, paged, dim**-0.5, window=window, softcap=softcap)
        results.append((q, *seen, mixed))
    # The last bit of an angle can move a key to the next number that the cache has.
    close = CLOSE[dtype]
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=close, atol=close)


@variants
@settings(max_examples=25, deadline=None)
@given(
    length=st.sampled_from([1, 2, 63, 64, 130, 300]),
    cuts=st.lists(st.integers(0, 299), max_size=4),
    ones=st.lists(st.integers(0, 299), max_size=20),
    threads=st.integers(1, 3),
    heads=heads_of,
    dim=dims,
    dtype=dtypes,
    window=windows,
    softcap=softcaps,
    seed=st.integers(0, 999),
)
def test_a_token_finds_the_same_alone_and_in_every_chunk(
    variant: Variant,
    length: int,
    cuts: list[int],
    ones: list[int],
    threads: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float,
    seed: int,
) -> None:
    ops = CpuOps(variant)
    stored = Paged.random([length], heads[1], dim, dtype, seed)
    q = torch.randn(length, heads[0], dim, generator=torch.Generator().manual_seed(seed))
    whole = stored.attend(ops, q, stored.rows([(0, length)]), window=window, softcap=softcap)
    alone = [(place % length, 1) for place in ones]
    rows = [*alone, *chunks(length, cuts)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        index = torch.cat([torch.arange(context, context + count) for context, count in rows])
        batch = stored.rows(rows, [0] * len(rows))
        assert torch.equal(stored.attend(ops, q[index], batch, window=window, softcap=softcap), whole[index])
    finally:
        torch.set_num_threads(before)


@variants
@pytest.mark.parametrize("rows", [[(150, 1)], [(130, 21)]])
def test_blocks_outside_the_window_are_not_read(variant: Variant, rows: list[tuple[int, int]]) -> None:
    """They may belong to others by now, and hold anything."""
    ops, window = CpuOps(variant), 20
    stored = Paged.random([151], 2, 16, torch.float32, seed=1)
    q = torch.randn(rows[0][1], 4, 16, generator=torch.Generator().manual_seed(2))
    expected = stored.attend(ops, q, stored.rows(rows), window=window)
    for block in stored.tables[0, : (rows[0][0] - window + 1) // 8].tolist():
        stored.keys[block] = stored.values[block] = float("nan")
    assert torch.equal(stored.attend(ops, q, stored.rows(rows), window=window), expected)


@variants
def test_a_row_that_is_not_finite_shows_it(variant: Variant) -> None:
    stored = Paged.random([70, 70], 1, 16, torch.float32, seed=3)
    stored.keys[stored.tables[0, 2], 1] = float("nan")
    q = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(4))
    found = stored.attend(CpuOps(variant), q, stored.rows([(69, 1), (69, 1)]))
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()
