"""The training ops against the reference's, values and gradients (autograd's own)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import Ops, ReferenceOps
from kernels.quantised import Int8Weight, quantise_int8
from kernels.training import TrainingOps


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    turns = torch.outer(torch.arange(tokens).float(), torch.rand(dim // 2))
    return turns.cos(), turns.sin()


CASES: dict[str, tuple[tuple[int, ...], Callable[[Ops, Tensor], Tensor]]] = {
    "rms_norm": ((5, 24), lambda ops, x: ops.rms_norm(x, torch.linspace(0.5, 2, 24), 1e-5)),
    "rms_norm of one token": ((1, 8), lambda ops, x: ops.rms_norm(x, torch.ones(8), 1e-6)),
    "silu_mul": ((5, 24), lambda ops, x: ops.silu_mul(x)),
    "linear": ((16, 24), lambda ops, x: ops.linear(x, torch.linspace(-1, 1, 48).view(2, 24), torch.ones(2))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    shape, op = CASES[name]
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(100, 100)
    found = []
    for ops in (ReferenceOps(), TrainingOps()):
        leaf = x.clone().requires_grad_()
        y = op(ops, leaf)
        (y * weight[: y.shape[0], : y.shape[1]]).sum().backward()  # type: ignore[no-untyped-call]
        found.append((y, leaf.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_rope(heads: int) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, heads, 8), torch.randn(6, heads, 8)
    cos, sin = angles(6, 8)
    found = []
    for ops in (ReferenceOps(), TrainingOps()):
        leaf = x.clone().requires_grad_()
        y = ops.rope(leaf[:, :, :], cos, sin)
        (y * target).sum().backward()  # type: ignore[no-untyped-call]
        found.append((y, leaf.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul"])
def test_bfloat16_goes_the_reference_s_way(name: str) -> None:
    shape, op = CASES[name]
    x = torch.randn(shape).bfloat16()
    assert torch.equal(op(TrainingOps(), x), op(ReferenceOps(), x))


def test_gradients_of_the_own_functions_by_differences() -> None:
    torch.manual_seed(0)
    from kernels.training import _RmsNorm, _Rope, _SiluMul

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64)
    cos, sin = (a.double().unsqueeze(1) for a in angles(3, 8))
    rows = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _RmsNorm.apply(t, weight, 1e-5), x)
    assert torch.autograd.gradcheck(_SiluMul.apply, x)
    assert torch.autograd.gradcheck(lambda t: _Rope.apply(t, cos, sin), rows)


def test_a_weight_in_integers_is_made_float_once_for_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards, until another weight comes: its values and gradients are the dequantised weight's."""
    torch.manual_seed(0)
    weights, made = [quantise_int8(torch.randn(40, 70)) for _ in range(2)], list[Int8Weight]()
    factor = Int8Weight.factor
    monkeypatch.setattr(Int8Weight, "factor", lambda self, dtype: made.append(self) or factor(self, dtype))
    ops, x, target = TrainingOps(), torch.randn(6, 70), torch.randn(6, 40)
    for weight in (*weights, weights[0]):
        for rows in (slice(0, 2), slice(2, 6)):
            leaf = x[rows].clone().requires_grad_()
            y = ops.linear(leaf, weight)
            (y * target[rows]).sum().backward()  # type: ignore[no-untyped-call]
            plain = weight.dequantise()
            torch.testing.assert_close(y.detach(), x[rows] @ plain.t(), atol=1e-4, rtol=1e-4)
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, target[rows] @ plain, atol=1e-4, rtol=1e-4)
    # `dequantise` makes its own, once a piece.
    assert len(made) == 3 + 3 * 2


def test_a_factor_can_be_made_ahead_of_its_first_piece() -> None:
    ops, weight, x = TrainingOps(), quantise_int8(torch.randn(40, 70)), torch.randn(3, 70)
    assert ops.lacks_factor(weight, torch.float32)
    ops.make_factor(weight, torch.float32)
    assert not ops.lacks_factor(weight, torch.float32)
    assert ops.lacks_factor(weight, torch.bfloat16)
    assert torch.equal(ops.linear(x, weight), TrainingOps().linear(x, weight))
    assert not ops.lacks_factor(torch.randn(40, 70), torch.float32)
