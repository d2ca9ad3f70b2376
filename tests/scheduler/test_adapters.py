"""Requests for adapter versions without a place in memory: who waits, for how long at most, and what ends the wait."""

from collections.abc import Iterable

import pytest

from runtime.blocks import BlockManager
from runtime.errors import TooManyRequests
from runtime.messages import ADAPTER_UNLOADED, ADAPTER_UNREADABLE
from runtime.scheduler import Committed, Request, Scheduler
from runtime.scheduler.adapters import MAX_READ_AHEAD
from runtime.scheduler.policies import BackgroundLast, make_policy
from settings.schema import AdapterSettings, SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, solo

MAX_WAIT = 10
"""Steps after which a version is promised a place: the clock counts steps."""


class Machine:
    """A scheduler, the toy model, and a reader that reads one version at a time, each in `read_steps` steps."""

    def __init__(
        self,
        keys: Iterable[str],
        *,
        places: int,
        policy: str = "fcfs",
        running: int = 4,
        blocks: int = 100,
        waiting: int = 100,
        read_steps: int = 0,
    ) -> None:
        self.now = 0
        self.scheduler = Scheduler(
            BlockManager(blocks, 2),
            BackgroundLast(make_policy(policy)),
            SchedulerSettings(max_batched_tokens=64, max_running=running, max_waiting=waiting),
            adapters=AdapterSettings(max_loaded=places, max_place_wait=MAX_WAIT),
            clock=lambda: self.now,
        )
        self.places = self.scheduler.adapters
        self.worker = ToyWorker(2)
        self.loads: list[str] = []
        self.ended: list[Committed] = []
        self.read_steps = read_steps
        self._reading: tuple[str, int] | None = None
        for key in keys:
            self.places.add(key)

    def submit(self, name: str, adapter: str, more: int = 3, **fields: object) -> Request:
        request = make_request(name, [1, 0, 2], more, adapter=adapter, **fields)
        self.scheduler.submit(request)
        return request

    def step(self, steps: int = 1) -> None:
        """Steps as an engine does them; the loads first."""
        for _ in range(steps):
            self._load()
            plan = self.scheduler.schedule()
            for admission in plan.admitted:
                assert self.places.admits(admission.adapter), "a request runs without its adapter"
            for item in self.scheduler.commit(plan, self.worker.execute(plan)):
                if not item.tokens:
                    self.ended.append(item)
                elif len(item.request.tokens) >= item.request.max_len:
                    self.scheduler.finish(item.request, "length")
            self.now += 1
            self.scheduler.check_integrity()

    def run(self, most: int = 1000) -> None:
        for _ in range(most):
            if not len(self.scheduler):
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def _load(self) -> None:
        if self._reading is not None and self._reading[1] <= self.now:
            self.places.end_read(self._reading[0])
            self._reading = None
        while True:
            while (key := self.places.next_load()) is not None:
                self.places.make_room(key)
                self.places.load(key)
                self.loads.append(key)
            if self._reading is not None or (key := self.places.next_read()) is None:
                return
            if self.read_steps:
                self._reading = key, self.now + self.read_steps
                return
            self.places.end_read(key)


def output(request: Request) -> list[int]:
    return solo(request.submission.prompt_ids, request.max_len, adapter=request.submission.adapter)


def test_requests_of_loaded_versions_go_before_one_that_waits() -> None:
    machine = Machine("ab", places=1)
    first = machine.submit("1", "a")
    machine.step()
    waiting, later = machine.submit("2", "b"), machine.submit("3", "a")
    machine.step()
    assert (first.slot is not None, waiting.slot, later.slot is not None) == (True, None, True)
    machine.run()
    assert machine.loads == ["a", "b"]
    assert [one.tokens for one in (first, waiting, later)] == [output(one) for one in (first, waiting, later)]


def test_no_step_waits_for_a_read() -> None:
    machine = Machine("ab", places=2, read_steps=6)
    base, adapted = machine.submit("1", "", more=20), machine.submit("2", "a")
    for count in range(5):
        machine.step()
        assert (base.num_generated, adapted.num_generated) == (count + 1, 0)
    machine.run()
    assert adapted.tokens == output(adapted)


def test_a_version_waits_a_bounded_time_for_a_place_that_never_falls_idle() -> None:
    """One request of `a` always runs, the next one comes before it ends."""
    machine = Machine("ab", places=1)
    waiting = None
    busy = [machine.submit("0", "a", more=6)]
    for count in range(1, 60):
        machine.step(3)
        busy.append(machine.submit(str(count), "a", more=6))
        if count == 3:
            waiting, began = machine.submit("b", "b"), machine.now
        if waiting is not None and waiting.num_generated:
            break
    assert waiting is not None
    assert machine.now - began <= MAX_WAIT + 6 + 3 + 1  # the bound, the running outputs, one round of this loop
    machine.run()
    assert machine.loads == ["a", "b", "a"]
    assert all(request.tokens == output(request) for request in busy)


@pytest.mark.parametrize("policy", ["fcfs", "fair", "priority", "deadline"])
def test_many_versions_over_few_places_all_end_and_few_loads_are_made(policy: str) -> None:
    keys = ["a" * n for n in range(1, 9)]
    machine = Machine(keys, places=2, policy=policy, read_steps=2, waiting=200)
    requests = [machine.submit(f"{turn}{key}", key, tenant=str(len(key) % 3)) for turn in range(10) for key in keys]
    machine.run(3000)
    assert all(request.tokens == output(request) for request in requests)
    assert len(machine.loads) <= 2 * len(keys)  # all ten of a version run in one or two turns


def test_all_that_waited_for_a_version_run_before_it_loses_its_place() -> None:
    """Five requests on two slots: some are queued when the next version has waited too long."""
    machine = Machine("abc", places=1, running=2)
    machine.submit("0", "a")
    machine.step()
    waited = [machine.submit(str(n), "b", more=12) for n in range(1, 6)]
    machine.step(2)
    other = machine.submit("6", "c")
    while not other.num_generated:
        machine.step()
    assert all(request.num_generated for request in waited)
    machine.run()
    assert machine.loads == ["a", "b", "c"]


def test_a_cancelled_request_gives_back_the_place_that_its_version_was_promised() -> None:
    machine = Machine("ab", places=1)
    running = machine.submit("1", "a", more=60)
    machine.step()
    waiting = machine.submit("2", "b")
    machine.step(MAX_WAIT + 1)
    held = machine.submit("3", "a")
    machine.step()
    assert held.slot is None  # the place is promised
    machine.scheduler.finish(waiting, "abort")
    machine.step()
    assert held.slot is not None
    machine.scheduler.finish(held, "abort")
    machine.scheduler.finish(running, "abort")
    assert not len(machine.scheduler)
    machine.scheduler.check_integrity()


def test_a_request_is_cancelled_between_the_load_and_the_next_plan() -> None:
    machine = Machine("a", places=1)
    gone, stays = machine.submit("1", "a"), machine.submit("2", "a")
    assert machine.places.next_read() == "a"
    machine.places.end_read("a")
    machine.places.load("a")
    machine.scheduler.finish(gone, "abort")
    machine.run()
    assert stays.tokens == output(stays)


def test_what_was_read_for_a_request_that_left_is_not_wanted() -> None:
    machine = Machine("ab", places=1, read_steps=1)
    machine.submit("1", "a", more=30)
    machine.step(2)
    waiting = machine.submit("2", "b")
    machine.step(3)
    assert machine.places.unwanted == []
    machine.scheduler.finish(waiting, "abort")
    assert machine.places.unwanted == ["b"]


def test_only_a_few_versions_are_read_ahead() -> None:
    keys = [f"k{n}" for n in range(12)]
    machine = Machine(["a", *keys], places=1)
    machine.submit("0", "a", more=8)
    machine.step()
    for key in keys:
        machine.submit(key, key)
    machine.step()
    assert len(machine.places._read) == MAX_READ_AHEAD
    machine.run()
    assert machine.loads == ["a", *keys]  # in their order


def test_a_version_that_goes_or_cannot_be_read_ends_the_requests_that_wait_for_it() -> None:
    machine = Machine("abc", places=1)
    machine.submit("1", "a", more=40)
    machine.step()
    waiting = [machine.submit("2", "b"), machine.submit("3", "b"), machine.submit("4", "c")]
    machine.step()
    machine.places.lose("b", ADAPTER_UNLOADED)
    machine.places.lose("c", ADAPTER_UNREADABLE)
    assert machine.places.next_read() is None  # not again
    machine.step()
    assert [(item.request, item.error) for item in machine.ended] == [
        (waiting[0], ADAPTER_UNLOADED), (waiting[1], ADAPTER_UNLOADED), (waiting[2], ADAPTER_UNREADABLE),
    ]  # fmt: skip
    assert all(request.finish_reason == "error" for request in waiting)
    assert len(machine.scheduler) == 1


def test_a_preempted_request_whose_version_lost_its_place_waits_and_goes_on() -> None:
    """Interactive requests of `b` take the place of a batch's `a`, which resumes with the same tokens."""
    machine = Machine(["a", "bb"], places=1)
    batch = machine.submit("1", "a", more=9, background=True)
    machine.step(4)
    urgent = machine.submit("2", "bb")
    machine.step(2)
    assert batch.timing.preemptions == 1
    assert urgent.num_generated
    machine.run()
    assert machine.loads == ["a", "bb", "a"]
    assert [one.tokens for one in (batch, urgent)] == [output(one) for one in (batch, urgent)]


def test_the_places_of_equals_are_not_taken() -> None:
    machine = Machine("ab", places=1, policy="priority")
    running = machine.submit("1", "a", more=9, priority=1)
    machine.step(2)
    machine.submit("2", "b", priority=1)
    machine.step(3)
    assert running.timing.preemptions == 0


def test_tenants_get_places_by_their_service() -> None:
    """Of two tenants that wait for a place, the one that had less comes first, though it came later."""
    machine = Machine(["a", "bb", "ccc"], places=1, policy="fair")
    machine.submit("1", "a", more=12, tenant="greedy")
    machine.step(3)
    greedy, modest = machine.submit("2", "bb", tenant="greedy"), machine.submit("3", "ccc", tenant="modest")
    machine.run()
    assert machine.loads == ["a", "ccc", "bb"]
    assert modest.timing.finished < greedy.timing.finished


def test_they_count_in_the_queue_and_their_time_passes() -> None:
    machine = Machine("ab", places=1, waiting=2)
    machine.submit("1", "a", more=30)
    machine.step()
    late, _ = machine.submit("2", "b", deadline=3.0), machine.submit("3", "b")
    with pytest.raises(TooManyRequests, match="2 requests are waiting"):
        machine.submit("4", "b")
    assert (len(machine.scheduler.waiting), len(machine.places)) == (2, 2)
    machine.step(3)
    assert late.finish_reason == "timeout"
    assert len(machine.places) == 1
