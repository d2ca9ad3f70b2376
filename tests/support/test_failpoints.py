"""Failpoints: what each action does, at which passes, and for which details."""

import threading
from collections.abc import Iterator

import pytest

from runtime.support.failpoints import FailpointError, configure, failpoint, passed, release


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    configure("")


def raised(name: str, details: list[object]) -> list[int]:
    """Numbers of the passes that raised."""
    found = []
    for number, detail in enumerate(details, start=1):
        try:
            failpoint(name, detail)
        except FailpointError:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("action", "expected"),
    [("raise", [1, 2, 3, 4, 5]), ("raise:3", [3]), ("raise:3+", [3, 4, 5]), ("raise:%2", [2, 4])],
)
def test_passes_that_raise(action: str, expected: list[int]) -> None:
    configure(f"here={action}")
    assert raised("there", [0] * 5) == []
    assert raised("here", [0] * 5) == expected
    assert passed("here") == 5


def test_a_detail_has_counts_of_its_own() -> None:
    configure("row@2=raise:2;row@7=raise")
    assert raised("row", [2, 1, 7, 2, 2]) == [3, 4]
    assert (passed("row@2"), passed("row@7")) == (3, 1)


def test_an_interrupt_is_no_exception_that_is_caught_by_accident() -> None:
    configure("row=interrupt:2")
    failpoint("row")
    with pytest.raises(KeyboardInterrupt):
        failpoint("row")


def test_a_pass_is_held_until_it_is_released() -> None:
    configure("row=hold")
    thread = threading.Thread(target=failpoint, args=("row",))
    thread.start()
    while not passed("row"):
        pass
    assert thread.is_alive()
    release("row")
    thread.join(30)
    assert not thread.is_alive()
    failpoint("row")  # at once


def test_an_unknown_action_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown action 'explode'.*raise, exit, sleep, interrupt, hold"):
        configure("row=explode")
