"""Who is waited for before a step: those who ran together, and for no longer than a quarter of a step."""

import pytest

from runtime.engine.service import LONGEST, Gathering


def seconds(gathering: Gathering, running: int, waiting: int, now: float = 0.0, step: float = 1.0) -> float:
    return gathering.seconds(running=running, waiting=waiting, step=step, now=now)


def test_a_lone_client_never_waits() -> None:
    gathering = Gathering()
    for _ in range(3):
        assert seconds(gathering, 0, 1) == 0.0
        assert seconds(gathering, 1, 0) == 0.0
        assert seconds(gathering, 0, 0) == 0.0


def test_those_who_ran_together_are_waited_for_until_they_are_there() -> None:
    gathering = Gathering()
    for running in (1, 4, 2, 0):
        assert seconds(gathering, running, 0) == 0.0
    assert seconds(gathering, 0, 1) == LONGEST
    assert seconds(gathering, 0, 3) == LONGEST
    assert seconds(gathering, 0, 4) == 0.0
    assert seconds(gathering, 4, 1) == 0.0  # nobody is held up for one who waits
    assert seconds(gathering, 0, 1) == LONGEST


def test_nobody_is_waited_for_longer_than_the_limit_nor_again() -> None:
    gathering = Gathering()
    seconds(gathering, 4, 0)
    assert seconds(gathering, 0, 1, now=10.0) == pytest.approx(LONGEST)
    assert seconds(gathering, 0, 2, now=10.0 + LONGEST / 2) == pytest.approx(LONGEST / 2)
    assert seconds(gathering, 0, 2, now=10.1) == 0.0
    assert seconds(gathering, 2, 0) == 0.0
    assert seconds(gathering, 0, 2) == 0.0  # two is what there were last time


def test_short_steps_are_waited_for_shortly() -> None:
    gathering = Gathering()
    seconds(gathering, 4, 0)
    assert seconds(gathering, 0, 1, step=0.004) == 0.001
    assert seconds(Gathering(), 0, 1, step=0.0) == 0.0
