"""int4 linears: the definition in numpy's 64-bit arithmetic, the C++ ops close to it and exact in any batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import Int4Weight, quantise_int4
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from runtime.model.layers import join
from tests.kernels.rows import check_broken_rows, check_normed, check_rows_alone, random

REFERENCE = kernels.load("reference")
BACKENDS = [REFERENCE, *([] if CpuOps.unavailable() else map(CpuOps, usable_variants()))]

backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: getattr(ops, "variant", ops).name)
sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 32, 33, 47, 64, 65, 130, 576])


def made_up(out: int, inner: int, seed: int) -> Int4Weight:
    """Any integers, scales and minimums: what checkpoints hold."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inner // 32)
    values = torch.randint(0, 16, (out, inner), generator=generator)
    return Int4Weight.of(values, random(out, groups, seed=seed) * 0.1, random(out, groups, seed=seed + 1))


@backends
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), inner=sizes, out=sizes, seed=st.integers(0, 99))
def test_products_are_those_of_the_values(ops: kernels.Ops, rows: int, inner: int, out: int, seed: int) -> None:
    x, weight = random(rows, inner, seed=seed), made_up(out, inner, seed)
    groups = np.pad(x.numpy(), ((0, 0), (0, -inner % 32))).reshape(rows, -(-inner // 32), 32)
    most = np.abs(groups).max(axis=2, keepdims=True)
    integers = np.rint(groups * (np.float32(127) / most))
    rounded = (integers.astype(np.float64) * most / 127).reshape(rows, integers.shape[1] * 32)[:, :inner]
    expected = rounded @ weight.dequantise(torch.float64).numpy().T
    assert torch.allclose(ops.linear(x, ops.prepare(weight)).double(), torch.from_numpy(expected), rtol=1e-4, atol=2e-3)


@backends
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_what_is_fused_with_them(ops: kernels.Ops, rows: int, inner: int, out: int, bias: bool, seed: int) -> None:
    x, residual, norm = random(rows, inner, seed=seed), random(rows, out, seed=seed + 1), random(inner, seed=seed + 2)
    weight, half = (quantise_int4(random(n, inner, seed=seed + 3)) for n in (2 * out, out))
    b = random(2 * out, seed=seed + 4) if bias else None
    short = None if b is None else b[:out]
    ours, our_half = ops.prepare(weight), ops.prepare(half)
    exact = REFERENCE.linear_add(residual, x, half, short)
    assert torch.allclose(ops.linear_add(residual, x, our_half, short), exact, rtol=1e-3, atol=2e-2)
    check_normed(ops, (ours, weight), x, norm, b)


@backends
def test_a_row_is_the_same_bit_by_bit_in_every_batch_and_on_any_number_of_threads(ops: kernels.Ops) -> None:
    check_rows_alone(ops, ops.prepare(made_up(77, 577, seed=2)))


@backends
def test_rows_that_are_zero_or_not_finite_stay_what_they_are(ops: kernels.Ops) -> None:
    check_broken_rows(ops, ops.prepare(made_up(50, 40, seed=2)))


@backends
def test_gradients_are_those_of_the_dequantised_weight(ops: kernels.Ops) -> None:
    x, weight = random(20, 40, seed=1).requires_grad_(), made_up(50, 40, seed=2)
    (ours,) = torch.autograd.grad(ops.linear(x, ops.prepare(weight)).square().sum(), x)
    (theirs,) = torch.autograd.grad((x @ weight.dequantise().t()).square().sum(), x)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_quantising_errs_less_than_rounding_between_the_extremes_and_keeps_what_has_four_bits() -> None:
    weight = random(64, 96, seed=1)
    quantised = quantise_int4(weight)
    error = (quantised.dequantise() - weight).square().mean()
    groups = weight.view(64, 3, 32)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().mean()
    assert error < 0.95 * plain
    again = quantise_int4(quantised.dequantise())
    assert torch.equal(again.dequantise(), quantised.dequantise())


@backends
def test_a_backends_own_layout_holds_the_same(ops: kernels.Ops) -> None:
    weight = made_up(37, 50, seed=1)
    ours = ops.prepare(weight)
    assert ours.shape == weight.shape
    assert torch.equal(ours.dequantise(), weight.dequantise())
    assert torch.equal(ours.rows(torch.tensor([36, 3])), weight.dequantise()[[36, 3]])
    x = random(3, 50, seed=2)
    assert torch.equal(ours.multiply(x), weight.multiply(x))


def test_values_come_back_one_by_one_and_joined() -> None:
    weight, other = made_up(30, 50, seed=1), made_up(3, 50, seed=5)
    assert weight.shape == (30, 50)
    assert weight.num_bytes == 30 * 2 * (16 + 4)
    assert torch.equal(weight.rows(torch.tensor([3, 3])), weight.dequantise()[[3, 3]])
    joined = join([weight, other])
    assert joined is not None
    assert torch.equal(joined.dequantise(), torch.cat((weight.dequantise(), other.dequantise())))
    constant = torch.full((2, 40), 0.25)
    assert torch.equal(quantise_int4(constant).dequantise(), constant)


@pytest.mark.parametrize(
    ("values", "scales", "minimums", "says"),
    [
        (torch.full((2, 32), 16), torch.ones(2, 1), torch.ones(2, 1), "from 0 to 15, got 16 to 16"),
        (torch.ones(2, 32), torch.ones(2, 2), torch.ones(2, 1), r"scales must be \[2, 1\]"),
        (torch.ones(2, 32), torch.ones(2, 1), torch.full((2, 1), 1e5), "minimums must be finite in float16"),
    ],
)
def test_what_is_no_int4_weight_is_refused(values, scales, minimums, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Int4Weight.of(values, scales, minimums)
