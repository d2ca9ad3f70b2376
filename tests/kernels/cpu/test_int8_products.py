"""Products of bytes in C++ against numpy's 64-bit integers, and the sums that ranks add up against the reference's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from kernels.hadamard import turn
from kernels.quantised import largest_of, quantise_int8, reach_of
from tests.kernels.rows import random

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")

variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)
sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 130, 200])


@variants
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 13), inner=sizes, out=sizes, extreme=st.booleans(), seed=st.integers(0, 99))
def test_they_are_exact(variant, rows: int, inner: int, out: int, extreme: bool, seed: int) -> None:
    """`extreme`: all bytes are as large as they get, of either sign."""
    weight = quantise_int8(random(out, inner, seed=seed).sign() if extreme else random(out, inner, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, weight.values.shape[1]), generator=generator)
    x = torch.where(x < 0, -128, 127) if extreme else x
    expected = x.numpy() @ weight.values.numpy().astype("int64").T
    assert (CpuOps(variant)._products(x.to(torch.int8), weight).numpy() == expected).all()


@variants
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_sums_of_a_slice_are_the_references_bit_by_bit(variant, rows: int) -> None:
    whole, weight = random(rows, 256, seed=1), random(77, 256, seed=2)
    whole[0, 200] = float("inf") if rows > 1 else 9.0
    part = quantise_int8(weight[:, 64:192], reach_of(turn(weight)))
    turned = turn(whole)
    arguments = (turned[:, 64:192], part, largest_of(turned))
    expected = REFERENCE.int8_sums(*arguments)
    assert torch.equal(CpuOps(variant).int8_sums(*arguments), expected)
    # A checkpoint's own integers are cut as a view.
    view = replace(part, values=torch.cat((part.values, part.values), dim=1)[:, : part.values.shape[1]])
    assert torch.equal(CpuOps(variant).int8_sums(arguments[0], view, arguments[2]), expected)
