"""Sampling in Triton: the reference's token for a given point."""

import pytest
import torch

from runtime.workers.sampler import uniform
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRITON, random

PARAMETERS = [
    (1.0, None, 1.0, 0.0),
    (0.7, None, 1.0, 0.0),
    (1.5, 5, 1.0, 0.0),
    (1.0, None, 0.8, 0.0),
    (1.0, None, 1.0, 0.1),
    (1.3, 20, 0.9, 0.02),
    (1.0, 1, 1.0, 0.0),
    (1.0, None, 1e-6, 0.0),
    (2.0, 300, 0.99, 0.0),
]
"""Temperature, top_k (None: no limit), top_p, min_p."""


def sample(ops, logits: torch.Tensor, points: list[float], parameters) -> list[int]:
    vocab = logits.shape[1]
    temperature, top_k, top_p, min_p = zip(*parameters, strict=True)
    arguments = [(points, torch.float64), (temperature, torch.float32), ([k or vocab for k in top_k], torch.int64)]
    arguments += [(top_p, torch.float32), (min_p, torch.float32)]
    tensors = [torch.tensor(values, dtype=dtype, device=DEVICE) for values, dtype in arguments]
    return ops.sample(logits, *tensors).tolist()


@pytest.mark.parametrize(("vocab", "draws"), [(1, 1), (40, 2), (1100, 1)])
def test_the_references_tokens(vocab: int, draws: int) -> None:
    """A batch in which every row has filters of its own, at points all over."""
    parameters = PARAMETERS * draws
    logits = random(len(parameters), vocab, seed=vocab) * 3
    points = [uniform(7, index) for index in range(len(parameters))]
    assert sample(TRITON, logits, points, parameters) == sample(REFERENCE, logits, points, parameters)


@pytest.mark.parametrize("point", [0.0, 1.0 - 2.0**-53])
def test_the_ends(point: float) -> None:
    """At both ends of what is left, beside tokens that cannot come."""
    logits = random(len(PARAMETERS), 50, seed=5)
    logits[:, ::3] = float("-inf")
    points = [point] * len(PARAMETERS)
    assert sample(TRITON, logits, points, PARAMETERS) == sample(REFERENCE, logits, points, PARAMETERS)


def test_equal_tokens_share_alike() -> None:
    """Four of one probability: three of them kept by top_k, two by top_p, each with the same share, by their ids."""
    logits = torch.full((1, 6), float("-inf"), device=DEVICE)
    logits[0, [1, 2, 4, 5]] = 1.5
    for parameters, ids in [((1.0, 3, 1.0, 0.0), [1, 2, 4]), ((1.0, None, 0.5, 0.0), [1, 2])]:
        points = [(index + 0.5) / len(ids) for index in range(len(ids))]
        assert [sample(TRITON, logits, [point], [parameters])[0] for point in points] == ids


def test_a_row_does_not_see_its_neighbours() -> None:
    some = PARAMETERS[2:5]
    logits, points = random(len(some), 40, seed=6), [0.37] * len(some)
    alone = [sample(TRITON, logits[i : i + 1], [0.37], [one])[0] for i, one in enumerate(some)]
    assert sample(TRITON, logits, points, some) == alone


def test_no_rows() -> None:
    none = torch.empty(0, device=DEVICE)
    logits, top_k = torch.empty(0, 40, device=DEVICE), none.long()
    assert TRITON.sample(logits, none.double(), none, top_k, none, none).shape == (0,)
