"""NormalFloat weights: bitsandbytes' values, and the ops on them those of the float weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import quantise_nf4
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from tests.kernels.rows import check_broken_rows, check_rows_alone, random

REFERENCE = kernels.load("reference")
COMPILED = [] if CpuOps.unavailable() else [*map(CpuOps, usable_variants())]

backends = pytest.mark.parametrize("ops", [REFERENCE, *COMPILED], ids=lambda ops: getattr(ops, "variant", ops).name)
compiled = pytest.mark.parametrize("ops", COMPILED, ids=lambda ops: ops.variant.name)
sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 47, 63, 64, 65, 130, 700])


def test_values_are_those_of_bitsandbytes() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    weight = random(48, 256, seed=1)
    packed, state = oracle.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantise_nf4(weight)
    assert torch.equal(ours.scales.flatten(), state.absmax)
    # A value half way between two may go either way.
    assert (ours.packed.flatten() != packed.flatten()).float().mean() < 1e-3
    assert torch.allclose(
        ours.dequantise(), oracle.dequantize_4bit(packed, state), atol=2e-2 * float(weight.abs().max())
    )


@backends
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 64, 5), (3, 100, 17), (40, 130, 64), (0, 64, 3)])
def test_products_and_gradients_are_those_of_the_float_weight(ops: kernels.Ops, rows: int, size: int, out: int) -> None:
    weight, x = quantise_nf4(random(out, size, seed=2)), random(rows, size, seed=3)
    expected = x @ weight.dequantise().t()
    assert torch.allclose(ops.linear(x, ops.prepare(weight)), expected, atol=1e-4)
    leaf = x.clone().requires_grad_()
    ops.linear(leaf, ops.prepare(weight)).square().sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, 2 * expected @ weight.dequantise(), rtol=1e-4, atol=1e-3)


@compiled
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 40), inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_what_is_fused_with_them(ops: kernels.Ops, rows: int, inner: int, out: int, bias: bool, seed: int) -> None:
    x, residual, norm = random(rows, inner, seed=seed), random(rows, out, seed=seed + 1), random(inner, seed=seed + 2)
    # As large as a model's: else large sums cancel out.
    weight, half = (quantise_nf4(random(n, inner, seed=seed + 3) / inner**0.5) for n in (2 * out, out))
    tiled, half_tiled = ops.prepare(weight), ops.prepare(half)
    b = random(2 * out, seed=seed + 4) if bias else None
    short = None if b is None else b[:out]
    for found, expected in [
        (ops.linear(x, tiled, b), REFERENCE.linear(x, weight, b)),
        (ops.linear_add(residual, x, half_tiled, short), REFERENCE.linear_add(residual, x, half, short)),
        (ops.norm_linear(x, norm, 1e-5, tiled, b), REFERENCE.norm_linear(x, norm, 1e-5, weight, b)),
        (ops.norm_swiglu(x, norm, 1e-5, tiled, b), REFERENCE.norm_swiglu(x, norm, 1e-5, weight, b)),
    ]:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


@compiled
def test_a_row_is_the_same_bit_by_bit_in_every_batch_and_on_any_number_of_threads(ops: kernels.Ops) -> None:
    check_rows_alone(ops, ops.prepare(quantise_nf4(random(77, 577, seed=2))))


@compiled
def test_so_it_is_with_a_norm_and_swiglu(ops: kernels.Ops) -> None:
    x, norm, weight = random(60, 577, seed=1), random(577, seed=3), ops.prepare(quantise_nf4(random(96, 577, seed=2)))
    whole = ops.norm_swiglu(x, norm, 1e-5, weight)
    for first, last in [(0, 1), (3, 9), (5, 45), (7, 10)]:
        assert torch.equal(ops.norm_swiglu(x[first:last], norm, 1e-5, weight), whole[first:last])


@compiled
def test_rows_that_are_zero_or_not_finite_stay_what_they_are(ops: kernels.Ops) -> None:
    check_broken_rows(ops, ops.prepare(quantise_nf4(random(50, 40, seed=2))))


@compiled
def test_tiles_hold_the_same_weight(ops: kernels.Ops) -> None:
    weight = quantise_nf4(random(35, 130, seed=5))
    tiled = ops.prepare(weight)
    assert tiled.shape == weight.shape
    assert torch.equal(tiled.dequantise(), weight.dequantise())
    index = torch.tensor([34, 0, 17])
    assert torch.equal(tiled.rows(index), weight.rows(index))


def test_rows_and_sizes() -> None:
    weight = quantise_nf4(torch.cat((random(3, 70, seed=4), torch.zeros(1, 70))))
    assert weight.shape == (4, 70)
    assert weight.num_bytes == 4 * 2 * (32 + 4)
    assert torch.equal(weight.rows(torch.tensor([2, 0])), weight.dequantise()[[2, 0]])
    assert torch.equal(weight.dequantise()[3], torch.zeros(70))
