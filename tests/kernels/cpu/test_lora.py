"""Adapters of a mixed batch in C++: the dense product that they stand for, the same bits for a token in every batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import LoraFactors, LoraSegment
from kernels.cpu import CpuOps
from kernels.cpu.lora import LoraLayout
from kernels.cpu.variants import usable_variants

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)
Shape = list[tuple[int, int]]
"""Outputs and rank of every part."""


def factors(inner: int, parts: Shape, gap: int, seed: int) -> LoraFactors:
    """Parts of the linear's output, `gap` columns before each of them."""
    generator = torch.Generator().manual_seed(seed)
    columns, end = [], 0
    for out, _ in parts:
        columns.append(end + gap)
        end += gap + out
    return LoraFactors(
        torch.randn(sum(rank for _, rank in parts), inner, generator=generator),
        tuple(torch.randn(out, rank, generator=generator) for out, rank in parts),
        tuple(columns),
        torch.cat([torch.full((rank,), 0.5 + index) for index, (_, rank) in enumerate(parts)]),
    )


def dense(given: LoraFactors, out: int) -> torch.Tensor:
    """The change of the weight [out, in] in float64."""
    change = torch.zeros(out, given.a.shape[1], dtype=torch.float64)
    a = torch.split(given.a.double() * given.scales.double().unsqueeze(1), [b.shape[1] for b in given.b])
    for part, b, column in zip(a, given.b, given.columns, strict=True):
        change[column : column + len(b)] += b.double() @ part
    return change


@variants
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 7, 32, 41]),
    inner=st.sampled_from([1, 5, 16, 33, 70, 576]),
    parts=st.lists(
        st.tuples(st.sampled_from([1, 7, 16, 31, 130, 300]), st.sampled_from([1, 3, 8, 16, 17, 40])),
        min_size=1, max_size=3,
    ),
    gap=st.sampled_from([0, 3]),
    adapters=st.integers(0, 5),
    held=st.sampled_from([None, torch.float32, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_dense_product(
    variant, tokens: int, inner: int, parts: Shape, gap: int, adapters: int, held: torch.dtype | None, seed: int
) -> None:
    """Each token is for one of some adapters, or for the base; of the last adapter only the first part is adapted. With
    numbers as they are `held`, or factors that were not prepared."""
    ops = CpuOps(variant)
    generator = torch.Generator().manual_seed(seed)
    out = sum(width + gap for width, _ in parts) + 2
    owner = torch.randint(-1, max(adapters, 1), (tokens,), generator=generator)
    x = torch.randn(tokens, inner + 3, generator=generator)[:, 2 : inner + 2]
    start = torch.randn(tokens, out, generator=generator)
    expected, segments = start.double(), []
    for index in range(adapters):
        own = factors(inner, parts[:1] if index == adapters - 1 else parts, gap, seed + index)
        own = own if held is None else ops.prepare_lora(own, held)
        rows = torch.nonzero(owner == index).flatten()
        expected[rows] += x[rows].double() @ dense(own.plain(), out).T
        segments.append(LoraSegment(rows, own))
    y = start.clone()
    assert ops.lora_apply(x, y, segments) is y
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) if tokens else 0.0)
    untouched = (owner < 0) | (owner >= adapters)
    assert torch.equal(y[untouched], start[untouched])


@variants
def test_a_token_is_the_same_bit_by_bit_in_every_batch_and_on_any_number_of_threads(variant) -> None:
    ops = CpuOps(variant)
    generator = torch.Generator().manual_seed(3)
    adapters = [ops.prepare_lora(factors(577, [(320, 16), (70, 8), (33, 40)], 1, seed)) for seed in range(3)]
    x, start = torch.randn(90, 577, generator=generator), torch.randn(90, 430, generator=generator)
    owner = torch.randint(0, 3, (90,), generator=generator)
    alone = start.clone()
    for token in range(90):
        ops.lora_apply(x[token : token + 1], alone[token : token + 1], [LoraSegment(None, adapters[owner[token]])])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for first, last in [(0, 90), (3, 40), (17, 20), (88, 90)]:
                y = start[first:last].clone()
                rows = [torch.nonzero(owner[first:last] == index).flatten() for index in range(3)]
                ops.lora_apply(x[first:last], y, [LoraSegment(*pair) for pair in zip(rows, adapters, strict=True)])
                assert torch.equal(y, alone[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("held", "close"), [(torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.int8, 0.5 / 127)])
def test_held_numbers_are_the_given_ones_rounded(held: torch.dtype, close: float) -> None:
    """bfloat16 has 8 bits; an integer is at most half of one off, of 127 that are the largest number of a rank."""
    given = factors(300, [(96, 8), (70, 5), (40, 3)], 2, 1)
    layout = CpuOps().prepare_lora(given, held)
    assert isinstance(layout, LoraLayout)
    assert layout.a.dtype is layout.b[0].dtype is held
    plain = layout.plain()
    for part, column in enumerate(given.columns):
        there, here = (dense(LoraFactors(one.a, one.b, one.columns, one.scales), 212) for one in (given, plain))
        rows = slice(column, column + len(given.b[part]))
        a = given.a.split([b.shape[1] for b in given.b])[part]
        # Both factors of every rank may be off.
        size = float((0.5 + part) * (a.abs().amax(1) * given.b[part].abs().amax(0)).sum())
        assert float((there[rows] - here[rows]).abs().max()) <= (2 * close + close**2 + 1e-6) * size


def test_parts_may_come_in_any_order() -> None:
    given = factors(20, [(70, 4), (65, 2)], 0, 1)
    turned = LoraFactors(
        torch.cat([given.a[4:], given.a[:4]]),
        given.b[::-1],
        given.columns[::-1],
        torch.cat([given.scales[4:], given.scales[:4]]),
    )
    x, y = torch.randn(3, 20), torch.zeros(3, 135)
    expected = y + x @ dense(given, 135).float().T
    ops = CpuOps()
    assert torch.allclose(ops.lora_apply(x, y, [LoraSegment(None, ops.prepare_lora(turned))]), expected, atol=1e-4)


def test_prepared_factors_are_the_same_numbers_for_any_backend() -> None:
    given = factors(20, [(8, 4), (5, 2)], 0, 1)
    prepared = CpuOps().prepare_lora(given)
    assert isinstance(prepared, LoraLayout)
    prepared = prepared.plain()
    assert torch.equal(prepared.a, given.a)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(prepared.b, given.b, strict=True))
