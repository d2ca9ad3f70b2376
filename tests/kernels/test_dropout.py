"""Masks by place: the same however they are cut, and as good as drawn ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.training import dropout_mask

COLUMNS = torch.arange(576, dtype=torch.int32)


def dropped(seed: int, rows: slice = slice(0, 2048), probability: float = 0.1) -> torch.Tensor:
    """[rows, 576] float64: 1 where the mask is 0."""
    return (dropout_mask(seed, rows, COLUMNS, probability) == 0).double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


@given(
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 5000),
    count=st.integers(1, 20),
    columns=st.lists(st.integers(0, 20_000), min_size=1, max_size=30),
    probability=st.sampled_from([0.05, 0.1, 0.5, 0.99]),
)
def test_an_element_depends_on_its_place_alone(
    seed: int, start: int, count: int, columns: list[int], probability: float
) -> None:
    numbers = torch.tensor(columns, dtype=torch.int32)
    mask = dropout_mask(seed, slice(start, start + count), numbers, probability)
    assert mask.shape == (count, len(columns))
    row, column = count // 2, len(columns) // 2
    alone = dropout_mask(seed, slice(start + row, start + row + 1), numbers[column : column + 1], probability)
    assert torch.equal(mask[row, column], alone[0, 0])
    assert {round(value, 5) for value in mask.flatten().tolist()} <= {0.0, round(1 / (1 - probability), 5)}


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x1234567800000000])
def test_masks_are_as_good_as_drawn_ones(seed: int) -> None:
    """Means and spreads of all, of rows and of columns, and no relation between neighbours and seeds: within five
    standard deviations of what independent elements have."""
    p, mask = 0.1, dropped(seed)
    rows, columns = mask.shape
    deviation = (p * (1 - p)) ** 0.5
    assert float(mask.mean()) == pytest.approx(p, abs=5 * deviation / mask.numel() ** 0.5)
    assert float(mask.mean(0).std()) == pytest.approx(deviation / rows**0.5, rel=5 / (2 * columns) ** 0.5)
    assert float(mask.mean(1).std()) == pytest.approx(deviation / columns**0.5, rel=5 / (2 * rows) ** 0.5)
    bound = 5 / mask.numel() ** 0.5
    assert correlation(mask[1:], mask[:-1]) < bound * 1.1
    assert correlation(mask[:, 1:], mask[:, :-1]) < bound * 1.1
    for other in (seed ^ 1, seed ^ (1 << 32), seed ^ (1 << 62)):
        assert correlation(mask, dropped(other)) < bound
