"""Weights in integers, in Triton against the reference: the same bits."""

import pytest
import torch

from kernels import Int8GroupWeight, QuantisedWeight, quantise_int4, quantise_int8, quantise_nf4
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRITON, random

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, of what is not finite


def grouped(weight: torch.Tensor) -> QuantisedWeight:
    out, size = weight.shape
    values = (weight * 30).round().clamp(-127, 127)
    return Int8GroupWeight.of(values, random(out, -(-size // 32), seed=8).abs() / 30)


kinds = pytest.mark.parametrize("kind", [quantise_int8, quantise_int4, grouped])


@kinds
@pytest.mark.parametrize(("rows", "size", "out"), [(0, 8, 4), (1, 1, 1), (3, 33, 65), (17, 96, 3), (2, 130, 70)])
def test_the_references_bits(kind, rows: int, size: int, out: int) -> None:
    weight = kind(random(out, size, seed=2))
    x, bias = random(rows, 2 * size, seed=1)[:, size:] * 3, random(out, seed=3)
    assert torch.equal(TRITON.linear(x, weight, bias), REFERENCE.linear(x, weight, bias))
    assert torch.equal(TRITON.linear(x, weight), REFERENCE.linear(x, weight))


@kinds
def test_activations_in_bfloat16(kind) -> None:
    weight, x = kind(random(20, 64, seed=2)), random(4, 64, seed=1).to(torch.bfloat16)
    found = TRITON.linear(x, weight)
    assert found.dtype is torch.bfloat16
    # The interpreter cuts off where a GPU rounds.
    assert torch.allclose(found.float(), REFERENCE.linear(x, weight).float(), rtol=2**-7, atol=0)


@kinds
def test_a_row_that_is_not_finite_breaks_itself_only(kind) -> None:
    weight, x = kind(random(5, 40, seed=2)), random(5, 40, seed=1)
    x[1, 3], x[2, 0], x[3] = float("nan"), float("inf"), 0.0
    found, expected = TRITON.linear(x, weight), REFERENCE.linear(x, weight)
    assert not found[[1, 2]].isfinite().any()
    assert torch.equal(found[[0, 3, 4]], expected[[0, 3, 4]])


def test_what_has_no_kernel_goes_through_the_reference() -> None:
    weight, x = quantise_nf4(random(5, 64, seed=2)), random(3, 64, seed=1)
    assert torch.equal(TRITON.linear(x, weight), REFERENCE.linear(x, weight))
    leaf = x.clone().requires_grad_()
    TRITON.linear(leaf, quantise_int8(random(5, 64, seed=2))).sum().backward()
    assert leaf.grad is not None
    assert DEVICE in str(leaf.grad.device)
