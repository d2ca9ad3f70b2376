"""Weights stored in bfloat16: the products are those of the same values in float32, and exact in any batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import store_bfloat16
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from tests.kernels.rows import random

REFERENCE = kernels.load("reference")
BACKENDS = [REFERENCE, *([] if CpuOps.unavailable() else map(CpuOps, usable_variants()))]

backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: getattr(ops, "variant", ops).name)
sizes = st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64, 70, 577])


@backends
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_products_are_those_of_the_widened_weight(ops, rows: int, inner: int, out: int, bias: bool, seed: int) -> None:
    x, norm, weight = (
        random(rows, inner, seed=seed),
        random(inner, seed=seed + 1),
        random(2 * out, inner, seed=seed + 2) / inner**0.5,  # as large as a model's: else sums of hundreds cancel out
    )
    stored, b = store_bfloat16(weight), random(2 * out, seed=seed + 3) if bias else None
    wide = stored.dequantise()
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(ops.linear(x, stored, b), REFERENCE.linear(x, wide, b), **close)
    expected = REFERENCE.norm_swiglu(x, norm, 1e-5, wide, b)
    assert torch.allclose(ops.norm_swiglu(x, norm, 1e-5, stored, b), expected, **close)


def test_a_row_is_the_same_in_every_batch_and_as_the_float_weights() -> None:
    if CpuOps.unavailable():
        pytest.skip("the reference's library does not promise it")
    x, stored = random(300, 577, seed=1), store_bfloat16(random(77, 577, seed=2))
    for variant in usable_variants():
        ops = CpuOps(variant)
        whole = ops.linear(x, stored)
        assert torch.equal(whole, ops.linear(x, stored.dequantise()))
        for first, last in [(0, 1), (3, 12), (5, 45), (17, 290)]:
            assert torch.equal(ops.linear(x[first:last], stored), whole[first:last])


def test_rows_and_sizes() -> None:
    stored = store_bfloat16(random(5, 7, seed=1))
    assert (stored.shape, stored.num_bytes) == ((5, 7), 70)
    assert torch.equal(stored.rows(torch.tensor([4, 0])), stored.dequantise()[[4, 0]])
