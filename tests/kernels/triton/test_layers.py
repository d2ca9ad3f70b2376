"""Norms, activations and rope in Triton against the reference."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import cache
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRITON, random

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, of what is meant to overflow

CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
types = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@types
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 33), (2, 576)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random(rows, 2 * size, seed=1).to(dtype)[:, size:] * 3, random(size, seed=2).to(dtype)
    for op in ("rms_norm", "rms_norm_plus_one"):
        found, expected = (getattr(ops, op)(x, weight, 1e-5) for ops in (TRITON, REFERENCE))
        assert found.dtype is dtype
        assert torch.allclose(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@types
@pytest.mark.parametrize(("rows", "inner"), [(0, 4), (1, 1), (3, 1030)])
def test_activations(dtype: torch.dtype, rows: int, inner: int) -> None:
    x = random(rows, 2 * inner, seed=3).to(dtype) * 4
    for found, expected in [
        *((TRITON.gelu_mul(x, tanh=tanh), REFERENCE.gelu_mul(x, tanh=tanh)) for tanh in (True, False)),
        *((TRITON.gelu(x, tanh=tanh), REFERENCE.gelu(x, tanh=tanh)) for tanh in (True, False)),
        (TRITON.silu_mul(x), REFERENCE.silu_mul(x)),
    ]:
        assert found.dtype is dtype
        assert torch.allclose(found, expected, rtol=CLOSE[dtype], atol=2 * CLOSE[dtype])


def test_an_activation_at_its_ends() -> None:
    ends = torch.tensor([0.0, -0.0, 1e-30, -88.0, -90.0, -1e4, 88.0, 1e4, float("inf"), float("nan")], device=DEVICE)
    gate_up = torch.cat((ends, torch.ones_like(ends))).unsqueeze(0)
    found, expected = TRITON.silu_mul(gate_up), REFERENCE.silu_mul(gate_up)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("heads", "dim", "half"), [((1, 1), 4, 0), ((3, 1), 12, 4), ((4, 2), 16, 8)])
def test_rope_and_cache(stored: torch.dtype, heads: tuple[int, int], dim: int, half: int) -> None:
    """Whole heads and parts of them, in a fused qkv as the decoder hands it over."""
    num_heads, num_kv = heads
    tokens, blocks, size = 3, 4, 4
    qkv = random(tokens, (num_heads + 2 * num_kv) * dim, seed=4)
    angles = random(tokens, half, seed=5)
    slots = torch.tensor([13, 2, 7], device=DEVICE)
    results = []
    for ops in (TRITON, REFERENCE):
        shape = (blocks, size, num_kv, cache.width(stored, dim))
        keys, values = (torch.zeros(shape, dtype=stored, device=DEVICE) for _ in range(2))
        q, k, v = qkv.clone().view(tokens, -1, dim).split([num_heads, num_kv, num_kv], dim=1)
        q, k = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), keys, values, slots)
        results.append((q, k, cache.read(keys, torch.float32), cache.read(values, torch.float32)))
    # The last bit of an angle can move a key to the next number that the cache has.
    close = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.int8: 3e-2}[stored]
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=close, atol=close)


def test_a_head_that_is_broken_stays_broken_in_a_cache_of_integers() -> None:
    q, k, v = (torch.full((1, 1, 4), value, device=DEVICE) for value in (1.0, float("nan"), float("inf")))
    keys, values = (torch.zeros(1, 2, 1, 8, dtype=torch.int8, device=DEVICE) for _ in range(2))
    none = torch.empty(1, 0, device=DEVICE)
    TRITON.rope_and_cache(q, k, v, none, none, keys, values, torch.tensor([1], device=DEVICE))
    assert not cache.is_finite(keys)
    assert not cache.is_finite(values)


def test_gradients_go_through_the_reference() -> None:
    x = random(2, 8, seed=1).requires_grad_()
    TRITON.silu_mul(TRITON.rms_norm(x, torch.ones(8, device=DEVICE), 1e-5)).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU it is there")
def test_without_a_gpu_it_is_only_for_the_interpreter() -> None:
    reason = kernels.available()["triton"]
    assert reason is not None
    assert "TRITON_INTERPRET" in reason
    with pytest.raises(ValueError, match="'triton' cannot be used here"):
        kernels.load("triton")
    script = "import kernels, sys; print(kernels.load().name, kernels.load('triton').name)"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True)
    automatic, asked_for = done.stdout.split()
    assert automatic != "triton"
    assert asked_for == "triton"


def test_triton_is_imported_by_nobody_who_does_not_ask() -> None:
    script = "import kernels, sys; kernels.load(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["False"]
