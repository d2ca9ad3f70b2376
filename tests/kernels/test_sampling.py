"""Sampling against the distributions that it should have, computed here the plain way."""

import pytest
import torch

from kernels import load
from kernels.sampling import FIRST_LOOK
from runtime.workers.sampler import uniform

DRAWS = 20_000


def filtered_distribution(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The definition, for one row: temper, drop below min_p, keep top_k, keep the smallest nucleus, normalise."""
    probs = (logits / temperature).softmax(-1).double()
    probs[probs < min_p * probs.max()] = 0
    order = probs.argsort(descending=True)
    probs[order[top_k:]] = 0
    probs /= probs.sum()
    total, kept = 0.0, torch.zeros_like(probs)
    for index in order.tolist():
        if total >= top_p:
            break
        kept[index] = probs[index]
        total += float(probs[index])
    return kept / kept.sum()


def draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, count: int) -> torch.Tensor:
    rows = logits.expand(count, -1).clone()
    points = torch.tensor([uniform(1234, i) for i in range(count)], dtype=torch.float64)
    full = torch.full((count,), 1.0)
    ops = load("reference")
    return ops.sample(rows, points, full * temperature, torch.full((count,), top_k), full * top_p, full * min_p)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 40, 1.0, 0.0),
        (0.7, 40, 1.0, 0.0),
        (1.5, 5, 1.0, 0.0),
        (1.0, 40, 0.8, 0.0),
        (1.0, 40, 1.0, 0.1),
        (1.3, 20, 0.9, 0.02),
        (1.0, 1, 1.0, 0.0),
        (1.0, 40, 1e-6, 0.0),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    expected = filtered_distribution(logits, temperature, top_k, top_p, min_p)
    drawn = draw(logits, temperature, top_k, top_p, min_p, DRAWS)
    counts = torch.bincount(drawn, minlength=40).double()
    assert counts[expected == 0].sum() == 0
    # Chi-squared over the tokens that can come: below its mean plus six standard deviations.
    live = expected > 0
    chi2 = ((counts[live] - DRAWS * expected[live]) ** 2 / (DRAWS * expected[live])).sum()
    freedom = int(live.sum()) - 1
    assert chi2 <= freedom + 6 * (2 * freedom) ** 0.5 + 1e-9


@pytest.mark.parametrize("params", [(1.0, 0, 0.99, 0.0), (1.0, 3000, 0.97, 0.0), (2.0, 0, 0.5, 0.3)])
def test_a_nucleus_wider_than_the_first_look(params: tuple[float, int, float, float]) -> None:
    """A flat distribution over 5,000 tokens: the cut lies far beyond the candidates that are sorted first."""
    temperature, top_k, top_p, min_p = params
    vocab = 5 * FIRST_LOOK
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 0.3
    expected = filtered_distribution(logits, temperature, top_k or vocab, top_p, min_p)
    drawn = draw(logits, temperature, top_k or vocab, top_p, min_p, 500)
    allowed = expected > 0
    assert int(allowed.sum()) > FIRST_LOOK
    # Float32 and float64 may disagree on which token is the very last of the nucleus.
    assert int((~allowed[drawn]).sum()) <= 1
    ranks = logits.argsort(descending=True).argsort()[drawn]
    assert int(ranks.max()) > FIRST_LOOK


def test_a_row_is_independent_of_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 3000, generator=generator)
    points = torch.rand(6, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.8])
    top_k = torch.tensor([3000, 10, 3000, 3000, 2000, 50])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.99, 0.5, 0.3])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.01, 0.0, 0.1])
    ops = load("reference")
    together = ops.sample(logits.clone(), points, temperature, top_k, top_p, min_p)
    for i in range(6):
        part = slice(i, i + 1)
        alone = ops.sample(logits[part].clone(), points[part], temperature[part], top_k[part], top_p[part], min_p[part])
        assert alone.tolist() == together[part].tolist()


def test_uniform_is_uniform_and_depends_on_both_arguments() -> None:
    drawn = [uniform(seed, position) for seed in range(100) for position in range(100)]
    values = torch.tensor(drawn, dtype=torch.float64)
    assert float(values.min()) >= 0.0
    assert float(values.max()) < 1.0
    assert abs(float(values.mean()) - 0.5) < 6 * (1 / 12 / 10_000) ** 0.5
    assert len(set(values.tolist())) == 10_000
    assert uniform(-5, 3) == uniform(-5, 3)
