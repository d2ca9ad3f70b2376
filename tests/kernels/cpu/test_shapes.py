"""Every op of the CPU backend against the reference over odd shapes, in every variant that this processor can run.

No token and one token, one head, sizes that fill no vector, rows with gaps between them, contexts of one token beside
long ones. `.ci/sanitize` runs this with more examples, on a build that finds reads and writes beyond a tensor's end.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import (
    LoraFactors,
    LoraSegment,
    PagedRows,
    Weight,
    cache,
    quantise_int4,
    quantise_int8,
    quantise_nf4,
    store_bfloat16,
)
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from kernels.int8_groups import Int8GroupWeight
from kernels.quantised import largest_of
from runtime.messages import Row
from runtime.workers.batch import build_batch
from tests.kernels.rows import random

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")
OPS = [] if CpuOps.unavailable() else [CpuOps(variant) for variant in usable_variants()]
EXAMPLES = int(os.environ.get("EFT_TEST_EXAMPLES", "8"))

backends = pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.variant.name)
some = settings(max_examples=EXAMPLES)
rows = st.sampled_from([0, 1, 2, 3, 5, 9, 11, 17, 33, 41])
sizes = st.integers(1, 130)
gaps = st.sampled_from(["none", "rows", "columns"])
seeds = st.integers(0, 999)


def int8_groups(weight: torch.Tensor) -> Int8GroupWeight:
    """As GGUF's Q8_0 rounds."""
    out, size = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -size % 32)).view(out, -1, 32)
    scales = (groups.abs().amax(2) / 127).half()
    values = (groups / scales.float().clamp(min=1e-6).unsqueeze(2)).round().clamp(-127, 127)
    return Int8GroupWeight.of(values.flatten(1)[:, :size].to(torch.int8), scales)


WEIGHTS = {
    "float32": lambda weight: weight,
    "bfloat16": store_bfloat16,
    "int8": quantise_int8,
    "int4": quantise_int4,
    "int8_groups": int8_groups,
    "nf4": quantise_nf4,
}
weight_kinds = pytest.mark.parametrize("kind", WEIGHTS)


def with_gaps(x: torch.Tensor, gaps: str) -> torch.Tensor:
    """The same values, but part of wider rows, or each column in one piece; what lies between is no number."""
    if gaps == "rows":
        wide = torch.full((x.shape[0], x.shape[1] + 3), float("nan"))
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    return x.t().contiguous().t() if gaps == "columns" else x


def prepared(ops: kernels.Ops, weight: Weight) -> Weight:
    return weight if isinstance(weight, torch.Tensor) else ops.prepare(weight)


def check(found: torch.Tensor, expected: torch.Tensor, *, rtol: float = 1e-4, atol: float = 2e-4) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=rtol, atol=atol), float((found - expected).abs().max())


@backends
@weight_kinds
@some
@given(count=rows, inner=sizes, out=sizes, bias=st.booleans(), gaps=gaps, seed=seeds)
def test_linears(ops: kernels.Ops, kind: str, count: int, inner: int, out: int, bias: bool, gaps: str, seed: int):
    x, residual = (with_gaps(random(count, n, seed=seed + n), gaps) for n in (inner, out))
    norm, b = random(inner, seed=seed + 1), random(2 * out, seed=seed + 2) if bias else None
    half = None if b is None else b[:out]
    whole, narrow = (WEIGHTS[kind](random(n, inner, seed=seed + 3)) for n in (2 * out, out))
    # An activation's last bit can move it to the next integer, of 127; then a weight of about 3 is counted once more.
    size = float(x.abs().max()) if count else 0.0
    close = {"atol": 1e-3} if kind in ("float32", "bfloat16", "nf4") else {"rtol": 1e-3, "atol": 1e-2 * (20 + size)}
    check(ops.linear(x, prepared(ops, whole), b), REFERENCE.linear(x, whole, b), **close)
    found = ops.linear_add(residual, x, prepared(ops, narrow), half)
    check(found, REFERENCE.linear_add(residual, x, narrow, half), **close)
    found = ops.norm_linear(x, norm, 1e-5, prepared(ops, whole), b)
    expected = REFERENCE.norm_linear(x, norm, 1e-5, whole, b)
    check(found, expected, **close)
    # A product of two: as far off as one, times the other.
    scale = 1.0 + (float(expected.abs().max()) if count else 0.0)
    found = ops.norm_swiglu(x, norm, 1e-5, prepared(ops, whole), b)
    check(found, REFERENCE.norm_swiglu(x, norm, 1e-5, whole, b), rtol=1e-3, atol=close["atol"] * scale)


@backends
@some
@given(count=rows, inner=sizes, out=sizes, seed=seeds)
def test_sums_of_slices_in_integers(ops: kernels.Ops, count: int, inner: int, out: int, seed: int) -> None:
    weight = quantise_int8(random(out, inner, seed=seed + 1))
    width = weight.values.shape[1]
    whole = random(count, width + 5, seed=seed)
    most, x = largest_of(whole), whole[:, 2 : width + 2]
    assert torch.equal(ops.int8_sums(x, weight, most), REFERENCE.int8_sums(x, weight, most))


@backends
@some
@given(count=rows, inner=sizes, outs=st.tuples(sizes, sizes), rank=st.integers(1, 33), seed=seeds, data=st.data())
def test_adapters(ops: kernels.Ops, count: int, inner: int, outs: tuple[int, int], rank: int, seed: int, data) -> None:
    x, y = random(count, inner, seed=seed), random(count, sum(outs), seed=seed + 1)
    ranks, columns = (rank, 1), (0, outs[0])
    b = tuple(random(out, r, seed=seed + out) for out, r in zip(outs, ranks, strict=True))
    factors = LoraFactors(random(sum(ranks), inner, seed=seed + 2), b, columns, random(sum(ranks), seed=seed + 3))
    second = LoraFactors(random(rank, inner, seed=seed + 4), b[:1], (0,), torch.full((rank,), 0.5))
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), dtype=torch.int64)
    mixed = [LoraSegment(torch.where(owners == who)[0], which) for who, which in ((1, factors), (2, second))]
    for segments in (mixed, [LoraSegment(None, factors)], []):
        check(ops.lora_apply(x, y.clone(), segments), REFERENCE.lora_apply(x, y.clone(), segments), atol=2e-3)


@backends
@some
@given(count=rows, size=sizes, gaps=gaps, spread=st.sampled_from([1e-6, 1.0, 1e4]), seed=seeds)
def test_norms_and_activations(ops: kernels.Ops, count: int, size: int, gaps: str, spread: float, seed: int) -> None:
    x, weight, bias = random(count, 2 * size, seed=seed) * spread, random(2 * size, seed=1), random(2 * size, seed=2)
    x = with_gaps(x, gaps)
    for name, arguments in (
        ("rms_norm", (weight, 1e-5)),
        ("rms_norm_plus_one", (weight, 1e-5)),
        ("layer_norm", (weight, bias, 1e-5)),
        ("layer_norm", (weight, None, 1e-5)),
        ("layer_norm", (None, None, 1e-5)),
        ("silu_mul", ()),
    ):
        check(getattr(ops, name)(x, *arguments), getattr(REFERENCE, name)(x, *arguments), atol=1e-5 * max(spread, 0.1))
    for tanh in (False, True):
        for name in ("gelu", "gelu_mul"):
            found, expected = (getattr(one, name)(x, tanh=tanh) for one in (ops, REFERENCE))
            check(found, expected, atol=1e-5 * max(spread, 0.1))


@backends
@some
@given(count=rows, size=st.integers(1, 40), inner=st.integers(1, 40), experts=st.integers(1, 4), seed=seeds)
def test_experts(ops: kernels.Ops, count: int, size: int, inner: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, experts, generator=generator).argsort(dim=1)[:, :2]
    shares = torch.rand(*chosen.shape, generator=generator)
    gate_up, down = random(experts, 2 * inner, size, seed=1), random(experts, size, inner, seed=2)
    x = random(count, size, seed=seed)
    check(ops.moe(x, chosen, shares, gate_up, down), REFERENCE.moe(x, chosen, shares, gate_up, down), atol=2e-3)


def paged(shape: list[tuple[int, int]], block_size: int, generator: torch.Generator) -> tuple[PagedRows, int]:
    """Rows of (context, count) over blocks in random order, and how many blocks the cache needs."""
    needed = [-(-(context + count) // block_size) for context, count in shape]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    if not shape:
        none = torch.zeros(0, dtype=torch.int64)
        return PagedRows(none, [], [], none.view(0, 0), block_size), len(order)
    tables = np.zeros((len(shape), max(needed)), dtype=np.int64)
    for index, blocks in enumerate(needed):
        tables[index, :blocks] = [order.pop() for _ in range(blocks)]
    plan = [Row(slot=s, start=a, count=n, sample=True, new_blocks=[]) for s, (a, n) in enumerate(shape)]
    tokens = {slot: [0] * (context + count) for slot, (context, count) in enumerate(shape)}
    return build_batch(plan, tokens, tables, block_size, torch.device("cpu")).paged, sum(needed) + 2


contexts = st.sampled_from([0, 0, 1, 2, 15, 16, 63, 64, 130, 511, 512, 700, 2100])
heads = st.sampled_from([(1, 1), (2, 1), (3, 3), (9, 3), (5, 1), (17, 1), (40, 2)])


@backends
@some
@given(
    shape=st.lists(st.tuples(contexts, st.sampled_from([1, 1, 1, 2, 3, 17, 40])), max_size=5),
    heads=heads,
    dim=st.sampled_from([2, 4, 6, 10, 18, 34, 64, 80, 96, 128]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    window=st.sampled_from([None, None, 1, 7, 100]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    seed=seeds,
)
def test_rope_and_attention(ops, shape, heads, dim, block_size, dtype, window, softcap, seed: int) -> None:
    """q, k and v are parts of one product, as the decoder has them."""
    generator = torch.Generator().manual_seed(seed)
    layout, blocks = paged(shape, block_size, generator)
    stored = [torch.zeros(blocks, block_size, heads[1], cache.width(dtype, dim), dtype=dtype) for _ in range(2)]
    for each in stored:
        everything = torch.arange(blocks * block_size)
        cache.write(each, everything, torch.randn(len(everything), heads[1], dim, generator=generator))
    tokens = len(layout.slots)
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], dim, generator=generator)
    angles = torch.randn(tokens, dim // 2, generator=generator)
    results = []
    for one in (ops, REFERENCE):
        keys, values = (each.clone() for each in stored)
        q, k, v = qkv.clone().split([heads[0], heads[1], heads[1]], dim=1)
        q, k = one.rope_and_cache(q, k, v, angles.cos(), angles.sin(), keys, values, layout.slots)
        found = one.paged_attention(q, k, v, keys, values, layout, dim**-0.5, window=window, softcap=softcap)
        results.append((q, k, cache.read(keys, torch.float32), cache.read(values, torch.float32), found))
    # The last bit of an angle can move a key to the next number that the cache has.
    close = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.int8: 4e-2}[dtype]
    for found, expected in zip(*results, strict=True):
        check(found, expected, rtol=close, atol=close)


@backends
@some
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 16, 65]), min_size=1, max_size=4),
    heads=heads,
    dim=st.sampled_from([2, 6, 18, 64]),
    turned=st.booleans(),
    window=st.sampled_from([None, 1, 7, 100]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=seeds,
)
def test_rope_and_attention_without_a_cache(ops, lengths, heads, dim, turned, window, softcap, seed: int) -> None:
    qkv = random(sum(lengths), heads[0] + 2 * heads[1], dim, seed=seed)
    angles = random(sum(lengths), dim // 2 if turned else 1, seed=seed + 1)
    results = []
    for one in (ops, REFERENCE):
        q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=1)
        q, k = (one.rope(x, angles.cos(), angles.sin()) for x in (q, k))
        results.append(one.packed_attention(q, k, v, lengths, dim**-0.5, window=window, softcap=softcap))
    check(*results)


@backends
@some
@given(count=rows, vocab=st.integers(1, 300), gaps=gaps, seed=seeds)
def test_argmax_and_sampling(ops: kernels.Ops, count: int, vocab: int, gaps: str, seed: int) -> None:
    logits = with_gaps(random(count, vocab, seed=seed) * 4, gaps)
    best, index = ops.argmax(logits)
    expected, where = logits.max(dim=-1)
    assert torch.equal(best, expected)
    assert torch.equal(index, where)
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, generator=generator, dtype=torch.float64)
    full = torch.ones(count)

    def sample(one: kernels.Ops, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
        each = torch.full((count,), top_k)
        return one.sample(logits.clone(), points, full * 0.7, each, full * top_p, full * min_p)

    assert torch.equal(sample(ops, 1, 1.0, 0.0), where)
    probs = (logits / 0.7).softmax(-1)
    for top_k, top_p, min_p in ((vocab, 1.0, 0.0), (min(vocab, 5), 1.0, 0.0), (vocab, 0.8, 0.0), (vocab, 1.0, 0.2)):
        tokens = sample(ops, top_k, top_p, min_p)
        assert tokens.dtype == torch.int64
        # The last bit of a sum can end a draw one token further, or a nucleus one token earlier, but rarely.
        same = tokens == sample(REFERENCE, top_k, top_p, min_p)
        assert int((~same).sum()) <= 1
        chance = probs.gather(1, tokens.unsqueeze(1)).squeeze(1) if count else full
        assert (chance >= 0.99 * min_p * probs.amax(1)).all() if count else tokens.numel() == 0
