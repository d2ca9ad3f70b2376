"""What training does in C++ against autograd through the reference, values and gradients, in every variant."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Ops
from kernels.cpu import CpuOps
from kernels.cpu.training import MOST_ROWS, CpuTrainingOps
from kernels.cpu.variants import Variant, usable_variants
from kernels.training import TrainingOps
from tests.kernels.rows import random

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")
variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)

Op = Callable[..., Tensor]


def check(variant: Variant, op: Op, *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """Compare an op that gets the ops and the inputs."""
    found = []
    for ops in (REFERENCE, CpuTrainingOps(CpuOps(variant))):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = op(ops, *leaves)
        (y * random(*y.shape, seed=7)).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            torch.testing.assert_close(op(ops, *inputs), y.detach(), atol=0, rtol=0)
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)


@variants
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "window"),
    [
        ([1], 1, 1, 16, None),
        ([64, 64], 2, 1, 64, None),
        ([5, 63, 65, 1, 130], 4, 2, 32, None),
        ([200, 3], 3, 3, 48, 20),
        ([150], 6, 1, 80, 64),
        ([129], 2, 2, 16, 1),
        ([70], 2, 1, 16, 500),
    ],
)
def test_attention(
    variant: Variant, lengths: list[int], heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    tokens = sum(lengths)
    q, k, v = (random(tokens, count, dim, seed=seed) for seed, count in enumerate((heads, kv_heads, kv_heads)))
    check(variant, lambda ops, *qkv: ops.packed_attention(*qkv, lengths, dim**-0.5, window=window), q, k, v)


@variants
def test_attention_of_some_heads_of_a_wider_tensor(variant: Variant) -> None:
    q, kv = random(70, 6, 32, seed=1), random(70, 3, 32, seed=2)
    check(variant, lambda ops, q, k: ops.packed_attention(q[:, 2:4], k[:, 1:2], k[:, 2:3], [70], 0.2), q, kv)


@variants
def test_large_scores(variant: Variant) -> None:
    """Weights of 0 and 1, and no overflow of what a token does not see."""
    q, k, v = (random(80, 1, 16, seed=seed) * 10 for seed in range(3))
    check(variant, lambda ops, *qkv: ops.packed_attention(*qkv, [80], 1.0), q.abs(), k, v, tolerance=2e-3)


@variants
def test_what_is_not_finite_stays_so_from_there_on(variant: Variant) -> None:
    q, k, v = (random(80, 1, 16, seed=seed) for seed in range(3))
    q[70] = float("nan")
    out = CpuTrainingOps(CpuOps(variant)).packed_attention(q, k, v, [80], 0.25)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [70]


@variants
@pytest.mark.parametrize("rows", [1, 7, 90])
@pytest.mark.parametrize("size", [2, 24, 100, 576])
def test_norm_and_swiglu(variant: Variant, rows: int, size: int) -> None:
    x, weight = random(rows, size, seed=1), random(size, seed=2)
    check(variant, lambda ops, x: ops.rms_norm(x, weight, 1e-5), x)
    check(variant, lambda ops, x: ops.rms_norm(x[:, : size // 2], weight[: size // 2], 1e-5), x)
    check(variant, lambda ops, x: ops.silu_mul(x), 3 * x)


@variants
@pytest.mark.parametrize(("dim", "half"), [(8, 4), (64, 32), (80, 12), (2, 1), (16, 0)])
def test_rope(variant: Variant, dim: int, half: int) -> None:
    angles = random(9, half, seed=3)
    check(variant, lambda ops, x: ops.rope(x[:, 1:], angles.cos(), angles.sin()), random(9, 4, dim, seed=4))


@variants
@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(variant: Variant, rows: int, bias: bool) -> None:
    weight, added = random(40, 72, seed=1), random(40, seed=2) if bias else None
    check(variant, lambda ops, x: ops.linear(x / 8, weight, added), random(rows, 72, seed=3))


@variants
def test_what_is_left_to_torch(variant: Variant) -> None:
    """Other types, a soft cap, odd heads, weights that are trained or do not lie in one piece."""
    ours, plain = CpuTrainingOps(CpuOps(variant)), TrainingOps()
    x, weight = random(6, 40, seed=1), random(24, 40, seed=2)
    heads, odd = random(6, 2, 16, seed=3), random(6, 2, 12, seed=4)
    cases: list[Callable[[Ops], Tensor]] = [
        lambda ops: ops.rms_norm(x.bfloat16(), weight[0].bfloat16(), 1e-5),
        lambda ops: ops.silu_mul(x.double()),
        lambda ops: ops.linear(x, weight.t().contiguous().t()),
        lambda ops: ops.packed_attention(heads, heads, heads, [6], 0.25, softcap=5.0),
        lambda ops: ops.packed_attention(odd, odd, odd, [6], 0.25),
    ]
    for case in cases:
        assert torch.equal(case(ours), case(plain))
    trained = weight.clone().requires_grad_()
    ours.linear(x, trained).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(trained.grad, x.sum(0).expand(24, 40))


def test_each_backend_has_its_own() -> None:
    assert type(kernels.training_ops(REFERENCE)) is TrainingOps
    assert type(kernels.training_ops(CpuOps())) is CpuTrainingOps
