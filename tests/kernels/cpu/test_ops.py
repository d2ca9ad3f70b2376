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
from kernels.cpu import CpuOps
from kernels.cpu.build import BuildError, find_compiler, library
from kernels.cpu.library import load_wanted
from kernels.cpu.variants import PLAIN, VARIABLE, Variant, usable_variants
from tests.kernels.rows import random

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

VARIANTS = usable_variants()
REFERENCE = kernels.load("reference")

variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
sizes = st.sampled_from([1, 2, 3, 12, 13, 16, 17, 31, 32, 33, 47, 49, 70, 96, 130])


@variants
@settings(max_examples=40, deadline=None)
@given(rows=sizes, inner=sizes, out=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_and_what_is_fused_with_it(variant, rows: int, inner: int, out: int, bias: bool, seed: int) -> None:
    ops = CpuOps(variant)
    x, residual, norm = random(rows, inner, seed=seed), random(rows, out, seed=seed + 1), random(inner, seed=seed + 2)
    weight = random(2 * out, inner, seed=seed + 3) / inner**0.5  # as large as a model's: else large sums cancel out
    b = random(2 * out, seed=seed + 4) if bias else None
    half = b if b is None else b[:out]
    for found, expected in [
        (ops._linear(x, weight, b), REFERENCE.linear(x, weight, b)),
        (ops._linear(x, weight, b, norm=norm, eps=1e-5), REFERENCE.norm_linear(x, norm, 1e-5, weight, b)),
        (ops._linear(x, weight, b, norm=norm, eps=1e-5, swiglu=True), REFERENCE.norm_swiglu(x, norm, 1e-5, weight, b)),
        (ops._linear(x, weight[:out], half, residual=residual), REFERENCE.linear_add(residual, x, weight[:out], half)),
    ]:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@variants
@pytest.mark.parametrize("size", [96, 1601], ids=["at_once", "in_parts"])
def test_a_row_is_the_same_in_every_batch_and_on_any_number_of_threads(variant, size: int) -> None:
    ops = CpuOps(variant)
    x, weight = random(600, size, seed=1), random(77, size, seed=2)
    whole = ops._linear(x, weight, None)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for first, last in [(0, 1), (1, 3), (2, 5), (3, 7), (3, 20), (5, 45), (17, 400), (599, 600)]:
                assert torch.equal(ops._linear(x[first:last], weight, None), whole[first:last])
    finally:
        torch.set_num_threads(threads)


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
    root = Path(__file__).parents[3]
    for name in ("plain", "abacus"):
        environment = {**os.environ, VARIABLE: name}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        if name == "plain":
            assert done.stdout.strip() == "plain", done.stderr
        else:
            assert f"{VARIABLE} is 'abacus'; this processor can run: plain" in done.stderr


@pytest.mark.parametrize(
    "error", [BuildError("unrecognised option"), OSError("not for this process")], ids=["compiler", "system"]
)
def test_where_the_newest_instructions_cannot_be_had_the_next_serve(error, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *slower = usable_variants()[::-1]
    if not slower or os.environ.get(VARIABLE):
        pytest.skip("there is one variant only")

    def compiled(variant: Variant) -> object:
        if variant == first:
            raise error
        return variant.name

    monkeypatch.setattr("kernels.cpu.library.load", compiled)
    assert load_wanted() == (slower[0], slower[0].name)
    monkeypatch.setenv(VARIABLE, first.name)
    with pytest.raises(type(error), match=str(error)):
        load_wanted()


def test_without_a_compiler_what_was_built_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("there is no compiler to be without")
    built = library(PLAIN)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library(PLAIN).name.split("-")[:-1] == built.name.split("-")[:-1]
