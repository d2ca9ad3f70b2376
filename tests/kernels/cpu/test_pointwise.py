"""Norms and activations in C++ against torch in float64, in every variant."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.cpu import CpuOps
from kernels.cpu.variants import Variant, usable_variants
from tests.kernels.paged import Paged
from tests.kernels.rows import random

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")
variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)
sizes = st.sampled_from([1, 2, 3, 12, 13, 16, 17, 31, 32, 33, 47, 49, 70, 96, 130, 3000])

Activation = Callable[[kernels.Ops, torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda ops, x: ops.silu_mul(x),
    "gelu": lambda ops, x: ops.gelu_mul(x, tanh=False),
    "gelu_tanh": lambda ops, x: ops.gelu_mul(x, tanh=True),
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@variants
@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from([0, 1, 3, 5, 40]), size=sizes, seed=st.integers(0, 99))
def test_norms(variant: Variant, rows: int, size: int, seed: int) -> None:
    ops = CpuOps(variant)
    x, weight, bias = random(rows, size, seed=seed) * 3 + 1, random(size, seed=seed + 1), random(size, seed=seed + 2)
    strided = torch.cat((x, x), dim=1)[:, :size]
    wide = [tensor.double() for tensor in (x, weight, bias)]
    # Where a row's values lie close together, their own rounding is large beside what they differ by.
    spread = wide[0].var(1, correction=0).add(1e-5).sqrt()
    close = float((wide[0].abs().amax(1) / spread).max()) if rows else 0.0
    for found, again, expected in [
        (ops.rms_norm(x, weight, 1e-5), ops.rms_norm(strided, weight, 1e-5), REFERENCE.rms_norm(*wide[:2], 1e-5)),
        (
            ops.rms_norm_plus_one(x, weight, 1e-5),
            ops.rms_norm_plus_one(strided, weight, 1e-5),
            REFERENCE.rms_norm(wide[0], 1 + wide[1], 1e-5),
        ),
        (ops.layer_norm(x, weight, bias, 1e-5), ops.layer_norm(strided, weight, bias, 1e-5),
         F.layer_norm(wide[0], (size,), *wide[1:], 1e-5)),
        (ops.layer_norm(x, weight, None, 1e-5), ops.layer_norm(strided, weight, None, 1e-5),
         F.layer_norm(wide[0], (size,), wide[1], None, 1e-5)),
        (ops.layer_norm(x, None, None, 1e-5), ops.layer_norm(strided, None, None, 1e-5),
         F.layer_norm(wide[0], (size,), None, None, 1e-5)),
    ]:  # fmt: skip
        assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=2e-5 + 1e-6 * close)
        assert torch.equal(found, again)


@variants
@activations
@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([0, 1, 3, 40]), size=sizes, seed=st.integers(0, 99))
def test_a_gate_of_any_size(variant: Variant, activation: str, rows: int, size: int, seed: int) -> None:
    ops, x = CpuOps(variant), random(rows, 2 * size, seed=seed) * 3
    found = ACTIVATIONS[activation](ops, x)
    expected = ACTIVATIONS[activation](REFERENCE, x.double())
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-5)
    if activation != "silu":
        plain = ops.gelu(x[:, :size], tanh=activation == "gelu_tanh")
        assert torch.equal(found, plain * x[:, size:])


@variants
@activations
def test_how_exact_activations_are(variant: Variant, activation: str) -> None:
    """Over all numbers that are not simply 0 or x: within 2e-6 of float64 for up to 8, and relative beyond."""
    x = torch.linspace(-100, 100, 20001)
    x = torch.cat((x, x / 15, x / 1e4, torch.tensor([-1e30, -1e4, 1e4, 1e30, 0.0, 1e-30, -1e-30])))
    gate_up = torch.cat((x, torch.ones_like(x))).unsqueeze(0)
    found = ACTIVATIONS[activation](CpuOps(variant), gate_up).double()
    expected = ACTIVATIONS[activation](REFERENCE, gate_up.double())
    assert ((found - expected).abs() / expected.abs().clamp(min=8.0)).max() < 2.5e-7


@variants
@activations
def test_what_is_not_finite_stays_so(variant: Variant, activation: str) -> None:
    gate_up = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0]])
    assert not ACTIVATIONS[activation](CpuOps(variant), gate_up).isfinite().any()


@variants
@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
def test_how_exact_the_weights_of_attention_are(variant: Variant, softcap: float) -> None:
    """Two tokens, whose values are 0 and 1: what is found is the second one's weight, from one to the smallest number.
    So powers of two are tested, and with a cap tanh."""
    stored = Paged.random([2], 1, 2, torch.float32, seed=1)
    for place, one in ((0, 0.0), (1, 1.0)):
        block, at = divmod(int(stored.rows([(place, 1)]).slots[0]), 8)
        stored.keys[block, at, 0] = torch.tensor([one, 0.0])
        stored.values[block, at, 0] = one
    q = torch.zeros(1, 4000, 2)
    q[0, :, 0] = torch.linspace(-120, 40, 4000)
    found = stored.attend(CpuOps(variant), q, stored.rows([(1, 1)]), softcap=softcap)[0, :, 0].double()
    scores = q[0, :, 0].double() * 2**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    expected = scores.sigmoid()
    # Rounding a score of s moves its weight by s times half a unit in the last place.
    allowed = 5e-7 + (scores.abs() + (softcap or 0.0)) * 3e-7
    assert ((found - expected).abs() / expected < allowed).all()
