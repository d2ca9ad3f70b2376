"""int8 linears: the definition in numpy's 64-bit integers, the C++ ops equal to the reference, exact in any batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import Quantiser
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from kernels.hadamard import turn, turn_back
from kernels.quantised import from_sums, largest_of, quantise_int8, quantise_narrow_int8, reach_of
from tests.kernels.rows import check_broken_rows, check_normed, check_rows_alone, random

REFERENCE = kernels.load("reference")
BACKENDS = [REFERENCE, *([] if CpuOps.unavailable() else map(CpuOps, usable_variants()))]

backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: getattr(ops, "variant", ops).name)
quantisers = pytest.mark.parametrize("quantise", [quantise_int8, quantise_narrow_int8])
sizes = st.sampled_from([1, 2, 3, 5, 16, 17, 32, 33, 47, 63, 64, 65, 130, 1500])


@backends
@quantisers
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 70), inner=sizes, out=sizes, seed=st.integers(0, 99))
def test_the_sums_are_those_of_integers(
    ops: kernels.Ops, quantise: Quantiser, rows: int, inner: int, out: int, seed: int
) -> None:
    x, weight = random(rows, inner, seed=seed), quantise(random(out, inner, seed=seed + 1))
    turned = turn(x).numpy()
    most = np.abs(turned).max(axis=1)
    integers = np.rint(turned * (np.float32(127) / most)[:, None]).astype(np.int64)
    total = integers @ weight.values.numpy().astype(np.int64).T
    expected = total * (most.astype(np.float64) / 127)[:, None] * weight.scales.double().numpy()
    assert torch.allclose(ops.linear(x, ops.prepare(weight)).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 0, 0), (0, 0, 2, 2), (2, 0, 0, 2)])
def test_bytes_that_are_all_as_large_as_they_get(ops: kernels.Ops, sizes: tuple[int, ...], rows: int) -> None:
    """Any four products that are summed in 16 bits are as large as there are, of any signs: these just hold them."""
    signs, turned = random(rows, 128, seed=1).sign(), random(40, 128, seed=2).sign()
    turned *= torch.tensor([sizes[0], sizes[1]] * 2 + [sizes[2], sizes[3]] * 2).repeat(16)
    weight = quantise_int8(turn_back(turned, 128))
    signs[0] = signs[0].abs()
    assert torch.equal(
        weight.values.unique(), torch.tensor([-127, 0, 127] if 2 in sizes else [-64, 64], dtype=torch.int8)
    )
    expected = signs @ weight.values.float().t() * weight.scales
    assert torch.allclose(ops.linear(turn_back(signs, 128), ops.prepare(weight)), expected, rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 0, 0), (0, 0, 2, 2), (2, 0, 0, 2)])
def test_bytes_without_a_sign_that_are_all_as_large_as_they_get(
    ops: kernels.Ops, sizes: tuple[int, ...], rows: int
) -> None:
    """The same for narrow weights: any four of them have one sign, and activations are 255 or 1 with their bias."""
    signs, of_fours = random(rows, 128, seed=1).sign(), random(40, 32, seed=2).sign()
    turned = of_fours.view(40, 16, 1, 2, 1).expand(-1, -1, 2, -1, 2).reshape(40, 128)
    turned *= torch.tensor([sizes[0], sizes[1]] * 2 + [sizes[2], sizes[3]] * 2).repeat(16)
    weight = quantise_narrow_int8(turn_back(turned, 128))
    signs[0] = signs[0].abs()
    assert weight.values.to(torch.int32).view(40, -1, 2, 2, 2).sum((2, 4)).abs().min() >= 126
    expected = signs @ weight.values.float().t() * weight.scales
    assert torch.allclose(ops.linear(turn_back(signs, 128), ops.prepare(weight)), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(inner=sizes, out=sizes, heavy=st.booleans(), seed=st.integers(0, 99))
def test_four_weights_are_never_too_large_together(inner: int, out: int, heavy: bool, seed: int) -> None:
    """For activations of -128 to 127 each."""
    weight = random(out, inner, seed=seed)
    values = quantise_int8(weight**5 if heavy else weight).values.numpy().astype(np.int64)
    fours = np.abs(values).reshape(out, -1, 2, 2, 2).sum(axis=(2, 4))
    assert np.abs(values).max() <= 127
    assert fours.max() * 128 <= 2**15


@settings(max_examples=30, deadline=None)
@given(inner=sizes, out=sizes, heavy=st.booleans(), seed=st.integers(0, 99))
def test_four_narrow_weights_of_one_sign_are_never_too_large_together(
    inner: int, out: int, heavy: bool, seed: int
) -> None:
    """For activations of 1 to 255 each."""
    weight = random(out, inner, seed=seed)
    found = quantise_narrow_int8(weight**5 if heavy else weight)
    values = found.values.numpy().astype(np.int64).reshape(out, -1, 2, 2, 2)
    assert found.narrow
    assert np.abs(values).max() <= 127
    for sign in (1, -1):
        assert (values * sign).clip(min=0).sum(axis=(2, 4)).max() * 255 < 2**15


@backends
@quantisers
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_what_is_fused_with_them(
    ops: kernels.Ops, quantise: Quantiser, rows: int, inner: int, out: int, bias: bool, seed: int
) -> None:
    x, residual, norm = random(rows, inner, seed=seed), random(rows, out, seed=seed + 1), random(inner, seed=seed + 2)
    weight, half = (quantise(random(n, inner, seed=seed + 3)) for n in (2 * out, out))
    b = random(2 * out, seed=seed + 4) if bias else None
    short = None if b is None else b[:out]
    exact = REFERENCE.linear_add(residual, x, half, short)
    assert torch.allclose(ops.linear_add(residual, x, half, short), exact, rtol=1e-5, atol=1e-4)
    check_normed(ops, (weight, weight), x, norm, b)


@backends
@quantisers
def test_a_row_is_the_same_bit_by_bit_in_every_batch_and_on_any_number_of_threads(
    ops: kernels.Ops, quantise: Quantiser
) -> None:
    weight = quantise(random(77, 577, seed=2))
    check_rows_alone(ops, ops.prepare(weight), weight)


@backends
@quantisers
def test_rows_that_are_zero_or_not_finite_stay_what_they_are(ops: kernels.Ops, quantise: Quantiser) -> None:
    weight = quantise(random(50, 40, seed=2))
    check_broken_rows(ops, weight)
    check_broken_rows(ops, ops.prepare(weight))


@backends
def test_gradients_are_those_of_the_dequantised_weight(ops: kernels.Ops) -> None:
    x, weight = random(20, 40, seed=1).requires_grad_(), quantise_int8(random(50, 40, seed=2))
    (ours,) = torch.autograd.grad(ops.linear(x, ops.prepare(weight)).square().sum(), x)
    (theirs,) = torch.autograd.grad((x @ weight.dequantise().t()).square().sum(), x)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_weights_turned_rows_are_off_by_at_most_half_a_step() -> None:
    weight = random(30, 50, seed=1)
    quantised = quantise_int8(weight)
    off = turn(weight) - quantised.factor(torch.float32)
    assert (off.abs() <= quantised.scales.unsqueeze(1) * 0.5001).all()
    assert torch.allclose(off.norm(), (quantised.dequantise() - weight).norm(), rtol=0.2)  # what fills up is left out
    assert torch.equal(quantised.rows(torch.tensor([3, 3])), quantised.dequantise()[[3, 3]])


@backends
@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 20), inner=sizes, out=sizes, seed=st.integers(0, 99))
def test_single_outputs_are_those_of_the_whole_bit_by_bit(
    ops: kernels.Ops, count: int, inner: int, out: int, seed: int
) -> None:
    weight = quantise_int8(random(out, inner, seed=seed))
    index = torch.randint(out, (count,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ops.prepare(weight).rows(index), weight.dequantise()[index])


@backends
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 40), inner=sizes, out=sizes, ranks=st.integers(1, 4), seed=st.integers(0, 99))
def test_slices_add_up_to_the_very_bits_of_the_whole(
    ops: kernels.Ops, rows: int, inner: int, out: int, ranks: int, seed: int
) -> None:
    """What ranks that hold a slice of the inputs each compute, against one that holds all. They hold whole blocks."""
    x, weight = random(rows, inner, seed=seed), random(out, inner, seed=seed + 1)
    whole, turned = quantise_int8(weight), turn(x)
    cuts = [min(inner, -(-inner // 64) * rank // ranks * 64) for rank in range(ranks + 1)]
    total = torch.zeros(rows, out, dtype=torch.int32)
    for first, last in pairwise(cuts):
        if last > first:
            slice_of = quantise_int8(weight[:, first:last], reach_of(turn(weight)))
            assert torch.equal(slice_of.values, whole.values[:, first : -(-last // 64) * 64])
            total += ops.int8_sums(turn(x[:, first:last]), slice_of, largest_of(turned))
    most = largest_of(turned)
    assert torch.equal(from_sums(total, whole, most), ops.linear(x, whole))


@backends
@quantisers
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 200)])
def test_a_product_of_factors_is_that_of_the_dequantised_weight(
    ops: kernels.Ops, quantise: Quantiser, shape: tuple[int, int]
) -> None:
    """What training multiplies with: the same bits on every backend, also of rows that are not one piece."""
    out, size = shape
    weight, rows = quantise(random(out, size, seed=3)), random(9, 2 * size, seed=4)[:, :size]
    prepared = ops.prepare(weight)
    assert torch.equal(prepared.factor(torch.float32), weight.factor(torch.float32))
    assert torch.equal(prepared.turned(rows), weight.turned(rows))
    assert torch.equal(prepared.turned_back(turn(rows)), weight.turned_back(turn(rows)))
    product = prepared.turned(rows) @ prepared.factor(torch.float32).t()
    assert torch.allclose(product, rows @ weight.dequantise().t(), rtol=1e-4, atol=1e-5)
