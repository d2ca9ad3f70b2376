"""Slices of datasets: as Python's, and as `datasets` rounds percentages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.trainer.data.examples import row_range


def never() -> int:
    raise AssertionError("counting reads the whole file")


@pytest.mark.parametrize(
    ("split", "expected"), [(None, (0, None)), ("train", (0, None)), ("train[:5]", (0, 5)), ("train[3:]", (3, None))]
)
def test_without_counting(split: str | None, expected: tuple[int, int | None]) -> None:
    assert row_range(split, never, param="s") == expected


@given(st.integers(-12, 12) | st.none(), st.integers(-12, 12) | st.none())
def test_as_pythons_slices(first: int | None, last: int | None) -> None:
    rows = list(range(10))
    text = f"train[{'' if first is None else first}:{'' if last is None else last}]"
    start, stop = row_range(text, lambda: 10, param="s")
    assert rows[start:stop] == rows[first:last]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:20%]", (0, 2)), ("train[25%:75%]", (2, 8)), ("train[-10%:]", (9, None)), ("train[:200%]", (0, 10))],
)
def test_percentages(split: str, expected: tuple[int, int | None]) -> None:
    assert row_range(split, lambda: 10, param="s") == expected


@pytest.mark.parametrize("split", ["test", "train[5]", "train[:x]", "train+test", "train[:1.5%]", ""])
def test_what_is_no_slice(split: str) -> None:
    with pytest.raises(InvalidRequest, match="a file has no other splits") as caught:
        row_range(split, never, param="datasets[0].split")
    assert caught.value.param == "datasets[0].split"
