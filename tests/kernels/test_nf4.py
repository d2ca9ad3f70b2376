"""NormalFloat weights: bitsandbytes' values, and the ops on them those of the float weight."""

import pytest
import torch

import kernels
from kernels import quantise_nf4
from kernels.cpu import CpuOps

OPS = [kernels.load("reference"), *([] if CpuOps.unavailable() else [CpuOps()])]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.name)
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 64, 5), (3, 100, 17), (40, 130, 64), (0, 64, 3)])
def test_products_and_gradients_are_those_of_the_float_weight(ops: kernels.Ops, rows: int, size: int, out: int) -> None:
    weight, x = quantise_nf4(random(out, size, seed=2)), random(rows, size, seed=3)
    expected = x @ weight.dequantise().t()
    assert torch.allclose(ops.linear(x, ops.prepare(weight)), expected, atol=1e-4)
    leaf = x.clone().requires_grad_()
    ops.linear(leaf, ops.prepare(weight)).square().sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, 2 * expected @ weight.dequantise(), rtol=1e-4, atol=1e-3)


def test_rows_and_sizes() -> None:
    weight = quantise_nf4(torch.cat((random(3, 70, seed=4), torch.zeros(1, 70))))
    assert weight.shape == (4, 70)
    assert weight.num_bytes == 4 * 2 * (32 + 4)
    assert torch.equal(weight.rows(torch.tensor([2, 0])), weight.dequantise()[[2, 0]])
    assert torch.equal(weight.dequantise()[3], torch.zeros(70))
