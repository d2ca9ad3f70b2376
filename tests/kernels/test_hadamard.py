"""Turning: Sylvester's matrix, its own inverse, and outliers that are gone."""

from functools import reduce

import torch

from kernels.hadamard import turn, turn_back
from tests.kernels.rows import random


def test_it_is_sylvesters_matrix_block_by_block() -> None:
    x = random(3, 128, seed=1)
    matrix = reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)] * 6) / 8
    expected = (x.double().view(3, 2, 64) @ matrix).view(3, 128)
    assert torch.allclose(turn(x).double(), expected, atol=1e-6)


def test_twice_is_what_was_there() -> None:
    for size in (1, 63, 64, 130):
        x = random(2, size, seed=size)
        assert turn(x).shape == (2, -(-size // 64) * 64)
        assert torch.allclose(turn_back(turn(x), size), x, atol=1e-6)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    assert torch.equal(turn(x)[0, :64], torch.zeros(64))
    assert torch.equal(turn(x)[0, 64:].abs(), torch.ones(64))
