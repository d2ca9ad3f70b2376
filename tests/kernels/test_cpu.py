"""The C++ ops against the reference, in every variant that this processor can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cache
from kernels.cpu import CpuOps
from kernels.cpu.build import find_compiler, library
from kernels.cpu.variants import PLAIN, VARIABLE, usable_variants
from kernels.interface import PagedRows

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

VARIANTS = usable_variants()
REFERENCE = kernels.load("reference")
BLOCK = 8

variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
sizes = st.sampled_from([1, 2, 3, 12, 13, 16, 17, 31, 32, 33, 47, 49, 70, 96, 130])


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@variants
@settings(max_examples=40, deadline=None)
@given(rows=sizes, inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_and_what_is_fused_with_it(variant, rows: int, inner: int, out: int, bias: bool, seed: int) -> None:
    ops = CpuOps(variant)
    x, residual, norm = random(rows, inner, seed=seed), random(rows, out, seed=seed + 1), random(inner, seed=seed + 2)
    weight = random(2 * out, inner, seed=seed + 3)
    b = random(2 * out, seed=seed + 4) if bias else None
    half = b if b is None else b[:out]
    for found, expected in [
        (ops._linear(x, weight, b), REFERENCE.linear(x, weight, b)),
        (ops._linear(x, weight, b, norm=norm, eps=1e-5), REFERENCE.norm_linear(x, norm, 1e-5, weight, b)),
        (ops._linear(x, weight, b, norm=norm, eps=1e-5, swiglu=True), REFERENCE.norm_swiglu(x, norm, 1e-5, weight, b)),
        (ops._linear(x, weight[:out], half, residual=residual), REFERENCE.linear_add(residual, x, weight[:out], half)),
    ]:
        assert torch.allclose(found, expected, rtol=1e-4, atol=2e-4)


@variants
def test_a_row_is_the_same_in_every_batch_and_on_any_number_of_threads(variant) -> None:
    ops = CpuOps(variant)
    x, weight = random(600, 96, seed=1), random(77, 96, seed=2)
    whole = ops._linear(x, weight, None)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for first, last in [(0, 1), (3, 20), (5, 45), (17, 400), (599, 600)]:
                assert torch.equal(ops._linear(x[first:last], weight, None), whole[first:last])
    finally:
        torch.set_num_threads(threads)


@variants
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 5), size=sizes, seed=st.integers(0, 99))
def test_norm_and_activation(variant, rows: int, size: int, seed: int) -> None:
    ops = CpuOps(variant)
    x, weight = random(rows, 2 * size, seed=seed) * 3, random(2 * size, seed=seed + 1)
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    assert torch.allclose(ops.silu_mul(x), REFERENCE.silu_mul(x), rtol=1e-5, atol=1e-6)
    strided = torch.cat((x, x), dim=1)[:, : 2 * size]
    assert torch.equal(ops.rms_norm(strided, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


@variants
def test_the_activation_at_its_ends(variant) -> None:
    ends = torch.tensor([0.0, -0.0, 1e-30, -88.0, -90.0, -1e4, 88.0, 1e4, float("inf"), float("nan")])
    gate_up = torch.cat((ends, torch.ones_like(ends))).unsqueeze(0)
    found = CpuOps(variant).silu_mul(gate_up)
    assert torch.allclose(found, REFERENCE.silu_mul(gate_up), rtol=1e-6, atol=1e-30, equal_nan=True)


@variants
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1, 7, 8, 63, 64, 65, 200, 1100]), st.sampled_from([1, 1, 2, 11, 40])),
                  max_size=5),
    heads=st.sampled_from([(1, 1), (9, 3), (8, 1), (3, 3), (40, 1)]),
    dim=st.sampled_from([2, 6, 16, 64, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_rope_cache_and_attention(variant, rows: list[tuple[int, int]], heads, dim: int, dtype, seed: int) -> None:
    """Decode and chunks mixed, over blocks in random order, in a fused qkv as the decoder hands it over."""
    rows = sorted(rows, key=lambda row: (row[1] > 1, row[0] if row[1] == 1 else 0))
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv = heads
    needed = [-(-(context + count) // BLOCK) for context, count in rows]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = torch.zeros(len(rows), max(needed, default=0), dtype=torch.int64)
    slots = []
    for index, ((context, count), blocks) in enumerate(zip(rows, needed, strict=True)):
        own = [order.pop() for _ in range(blocks)]
        tables[index, :blocks] = torch.tensor(own)
        slots += [own[at // BLOCK] * BLOCK + at % BLOCK for at in range(context, context + count)]
    paged = PagedRows(torch.tensor(slots, dtype=torch.int64), [c for _, c in rows], [c for c, _ in rows], tables, BLOCK)
    caches = [torch.zeros(sum(needed) + 2, BLOCK, num_kv, cache.width(dtype, dim), dtype=dtype) for _ in range(2)]
    for stored in caches:
        everything = torch.arange(len(stored) * BLOCK)
        cache.write(stored, everything, torch.randn(len(everything), num_kv, dim, generator=generator))
    tokens = len(slots)
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv) * dim, generator=generator)
    angles = torch.randn(tokens, dim // 2, generator=generator)
    results = []
    for ops in (CpuOps(variant), REFERENCE):
        keys, values = (stored.clone() for stored in caches)
        q, k, v = torch.split(qkv.clone().view(tokens, num_heads + 2 * num_kv, dim), [num_heads, num_kv, num_kv], dim=1)
        q, k = ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), keys, values, paged.slots)
        seen = (cache.read(keys, torch.float32), cache.read(values, torch.float32))
        results.append((q, *seen, ops.paged_attention(q, k, v, keys, values, paged, dim**-0.5)))
    # The last bit of an angle can move a key to the next number that the cache has.
    close = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.int8: 4e-2}[dtype]
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=close, atol=close)


@variants
def test_argmax_takes_the_first_of_equals_and_shows_nan(variant) -> None:
    logits = random(7, 101, seed=3)
    logits[1, [5, 90]] = 9.0
    logits[2, 100] = 9.0
    logits[3, 70] = float("nan")
    logits[4] = float("-inf")
    logits[5, 3] = float("inf")
    logits[6, :] = float("nan")
    best, index = CpuOps(variant).argmax(logits)
    expected, where = logits.max(dim=-1)
    assert torch.equal(index, where)
    assert torch.allclose(best, expected, equal_nan=True)


def test_gradients_go_through_the_reference() -> None:
    x = random(16, 8, seed=1).requires_grad_()
    CpuOps().norm_linear(x, torch.ones(8), 1e-5, random(4, 8, seed=2)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_no_second_openmp_runtime_is_loaded() -> None:
    CpuOps()._linear(random(32, 64, seed=1), random(48, 64, seed=2), None)
    names = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))]) == 1


def test_a_variant_can_be_forced_and_a_wrong_one_is_refused() -> None:
    script = "import kernels; ops = kernels.load('cpu'); print(ops.variant.name)"
    root = Path(__file__).parents[2]
    for name in ("plain", "abacus"):
        environment = {**os.environ, VARIABLE: name}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        if name == "plain":
            assert done.stdout.strip() == "plain", done.stderr
        else:
            assert f"{VARIABLE} is 'abacus'; this processor can run: plain" in done.stderr


def test_without_a_compiler_what_was_built_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("there is no compiler to be without")
    built = library(PLAIN)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library(PLAIN).name.split("-")[:-1] == built.name.split("-")[:-1]
