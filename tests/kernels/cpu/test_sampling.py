"""Sampling in C++ against its definition in float64, and against the reference: the same token for the same point."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.cpu import CpuOps
from kernels.cpu.variants import usable_variants
from runtime.workers.sampler import uniform

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

REFERENCE = kernels.load("reference")
EDGE = 2e-5
"""How far float32 weights may move a point, the end of a nucleus or a threshold."""

TINY = float(np.finfo(np.float32).tiny)
"""Weights below it may be none at all: a point of exactly 0 is then not theirs."""

variants = pytest.mark.parametrize("variant", usable_variants(), ids=lambda variant: variant.name)
Filters = tuple[float, int, float, float]
"""Temperature, top_k (0: no limit), top_p, min_p."""


def sample(ops: kernels.Ops, logits: torch.Tensor, points: list[float], filters: list[Filters]) -> list[int]:
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    return ops.sample(
        logits,
        torch.tensor(points, dtype=torch.float64),
        torch.tensor(temperature, dtype=torch.float32),
        torch.tensor([k or logits.shape[1] for k in top_k]),
        torch.tensor(top_p, dtype=torch.float32),
        torch.tensor(min_p, dtype=torch.float32),
    ).tolist()


def defined(logits: torch.Tensor, point: float, filters: Filters) -> set[int]:
    """The tokens that the definition gives, with points and filters a little to either side."""
    temperature, top_k, top_p, min_p = filters
    row = logits.double().numpy()
    free = (top_k or len(row)) >= len(row) and top_p >= 1 and min_p == 0
    order = np.arange(len(row)) if free else np.argsort(-row, kind="stable")
    weights = np.exp((row - row.max()) / temperature)[order]
    total = weights.sum()
    found = set()
    rank = np.arange(len(row))
    edges = (-EDGE, 0, EDGE)
    for least, near_min, near_top, near_point in itertools.product((0, TINY), edges, edges, edges):
        passed = (weights >= max(least, min(min_p * (1 + near_min), 1))) & (rank < (top_k or len(row)))
        kept = np.where(passed, weights, 0)
        limited = (top_k and top_k < len(row)) or min_p > 0
        before = np.cumsum(kept) - kept
        mass = (kept.sum() if limited else total) * (top_p + near_top)
        if top_p < 1:
            kept = np.where((before < mass) | (rank == 0), kept, 0)
        at = np.searchsorted(np.cumsum(kept), min(max(point + near_point, 0.0), 1.0) * kept.sum(), side="right")
        found.add(int(order[min(at, np.flatnonzero(kept)[-1])]))
    return found


filters_of_all_kinds = st.tuples(
    st.sampled_from([1e-30, 0.01, 0.3, 0.7, 1.0, 1.5, 10.0]),
    st.sampled_from([0, 1, 2, 5, 40, 300]),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0, 1.0]),
    st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
)


@variants
@settings(max_examples=120, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 7, 8, 9, 17, 31, 32, 33, 500, 1000, 3001]),
    filters=filters_of_all_kinds,
    point=st.one_of(st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]), st.floats(0, 1, exclude_max=True)),
    steps=st.sampled_from([0.0, 0.5, 4.0]),
    masked=st.sampled_from([0.0, 0.3, 0.99]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 999),
)
def test_the_token_is_the_one_that_the_definition_says(
    variant, vocab: int, filters: Filters, point: float, steps: float, masked: float, spread: float, seed: int
) -> None:
    """`steps` above 0 rounds logits to multiples of it, so that many are equal; `masked` is the share of -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator) * spread
    logits = (logits / steps).round() * steps if steps else logits
    hidden = torch.rand(1, vocab, generator=generator) < masked
    hidden[0, seed % vocab] = False
    logits[hidden] = float("-inf")
    (token,) = sample(CpuOps(variant), logits, [point], [filters])
    assert token in defined(logits[0], point, filters)


@variants
def test_a_vocabulary_of_a_models_size_as_the_reference_samples_it(variant) -> None:
    choices: list[Filters] = [
        (1.0, 0, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (0.7, 50, 0.95, 0.0), (1.0, 0, 1.0, 0.05), (1.2, 2000, 0.99, 1e-5),
        (1.0, 1, 1.0, 0.0), (2.0, 0, 0.999, 0.0), (1.0, 0, 1e-9, 0.0),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 49_153, generator=generator) * torch.linspace(0.2, 4, 16).unsqueeze(1)
    filters = choices * 2
    points = [uniform(3, index) for index in range(16)]
    found, expected = (sample(ops, logits, points, filters) for ops in (CpuOps(variant), REFERENCE))
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == theirs or {ours, theirs} <= defined(logits[row], points[row], filters[row])


@variants
def test_equal_tokens_share_alike_in_the_order_of_their_ids(variant) -> None:
    logits = torch.full((1, 40_000), float("-inf"))
    logits[0, [1, 2, 4, 39_999]] = 1.5
    for filters, ids in [
        ((1.0, 3, 1.0, 0.0), [1, 2, 4]),
        ((1.0, 0, 0.5, 0.0), [1, 2]),
        ((1.0, 0, 1.0, 1.0), [1, 2, 4, 39_999]),
    ]:
        points = [(index + 0.5) / len(ids) for index in range(len(ids))]
        assert [sample(CpuOps(variant), logits, [point], [filters])[0] for point in points] == ids


@variants
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(variant) -> None:
    ops = CpuOps(variant)
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(24, 3007, generator=generator)
    logits = wide[:, 3:3003]
    filters: list[Filters] = [(1.0, 0, 1.0, 0.0), (0.5, 10, 1.0, 0.0), (2.0, 0, 0.9, 0.0), (1.0, 2000, 0.5, 0.01)] * 6
    points = [uniform(9, index) for index in range(24)]
    alone = [sample(ops, logits[i : i + 1], [points[i]], [filters[i]])[0] for i in range(24)]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert sample(ops, logits, points, filters) == alone
            assert sample(ops, logits.t().contiguous().t(), points, filters) == alone
    finally:
        torch.set_num_threads(threads)


@variants
@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.7, 3, 0.9, 0.1)])
def test_a_row_that_is_not_finite_gives_the_token_that_is_not(variant, filters: Filters) -> None:
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(2))
    logits[0, 66] = float("nan")
    logits[1, [9, 20]] = float("inf")
    logits[2] = float("-inf")
    found = sample(CpuOps(variant), logits, [0.5] * 4, [filters] * 4)
    assert found[:3] == [66, 9, 0]
    assert found[3] in defined(logits[3], 0.5, filters)


def test_no_rows() -> None:
    none = torch.empty(0)
    assert CpuOps().sample(torch.empty(0, 9), none.double(), none, none.long(), none, none).shape == (0,)
