"""A hypothesis state machine over the real scheduler and block pool, with a toy model as the worker.

Every policy, with and without drafts, planning ahead or not, recomputing or swapping; requests come, fork, are held to
a grammar that forces tokens, are aborted, run out of time, stop early and are preempted; adapters get new versions, and
wait for one of two places, or are lost while requests wait; prefixes are forgotten; allocations and rows fail. Whatever
happens: nothing is lost, every request ends, and what it got is what it would have got alone.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.blocks import BlockManager, SwapSpace
from runtime.messages import StepPlan
from runtime.scheduler import Request, RequestState, Scheduler, Speculation
from runtime.scheduler.policies import POLICIES, make_policy
from runtime.support import failpoints
from settings.schema import AdapterSettings, SchedulerSettings
from tests.scheduler.toy import FORCED, Ahead, ToyWorker, make_request, solo, step

BLOCK, BLOCKS, SLOTS, BUDGET = 2, 7, 3, 6
PLACED = ("bb", "bbb", "bbbb", "bbbbb")
"""Adapters that share two places in memory; others have places of their own."""
VOCAB = 3  # few tokens, so that prefixes meet often
LIMIT = BLOCK * BLOCKS


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        drafts=st.sampled_from([None, 2]),
        caching=st.booleans(),
        ahead=st.booleans(),
        host=st.sampled_from([None, 3, 20]),
    )
    def start(self, policy: str, drafts: int | None, caching: bool, ahead: bool, host: int | None) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            BlockManager(BLOCKS, BLOCK, prefix_caching=caching),
            make_policy(policy),
            SchedulerSettings(
                max_batched_tokens=BUDGET, max_prefill_chunk=3, max_running=SLOTS, max_waiting=100, max_preemptions=2
            ),
            speculation=None if drafts is None else Speculation(drafts, max_running=2, min_acceptance=0.1),
            swap=None if host is None else SwapSpace(host),
            adapters=AdapterSettings(max_loaded=2, max_place_wait=4),
            clock=lambda: self.now,
        )
        self.worker = ToyWorker(BLOCK, vocab=VOCAB)
        self.ahead = Ahead(self.scheduler, self.worker) if ahead else None
        self.version = 1
        self.requests: list[Request] = []
        for key in PLACED:
            self.scheduler.adapters.add(key)

    def _submit(self, prompt: list[int], more: int, **fields: object) -> None:
        label = "again" if len(self.requests) % 2 else "again/beam-1"
        request = make_request(label, prompt, more, limit=LIMIT, **fields)
        self.scheduler.submit(request)
        self.requests.append(request)

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LIMIT - 1),
        more=st.integers(1, 8),
        adapter=st.sampled_from(["", "version", *PLACED]),
        salt=st.sampled_from(["", "s"]),
        priority=st.integers(0, 2),
        grammar=st.sampled_from(["", "", "g"]),
        patience=st.none() | st.integers(1, 60),
        tenant=st.sampled_from("ab"),
    )
    def submit(
        self,
        prompt: list[int],
        more: int,
        adapter: str,
        salt: str,
        priority: int,
        grammar: str,
        patience: int | None,
        tenant: str,
    ) -> None:
        self._submit(
            prompt,
            more,
            adapter="a" * self.version if adapter == "version" else adapter,
            cache_salt=salt,
            priority=priority,
            grammar=grammar,
            tenant=tenant,
            deadline=None if patience is None else self.now + patience,
        )

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), more=st.integers(1, 8))
    def fork(self, data: st.DataObject, more: int) -> None:
        """Of any request there ever was: a finished leader is no leader."""
        leader = data.draw(st.sampled_from(self.requests)).submission
        fields = {"adapter": leader.adapter, "cache_salt": leader.cache_salt, "grammar": leader.grammar}
        self._submit(leader.prompt_ids, more, fork_of=leader.id, **fields)

    @property
    def busy(self) -> bool:
        return self.ahead.busy if self.ahead else len(self.scheduler) > 0

    def _step(self) -> StepPlan:
        places = self.scheduler.adapters
        for key in places.unwanted:
            places.lose(key, "")
        while (key := places.next_load()) is not None or (key := places.next_read()) is not None:
            if key in places._reading:
                places.end_read(key)
                continue
            places.make_room(key)
            places.load(key)
        return self.ahead.step() if self.ahead else step(self.scheduler, self.worker)

    @precondition(lambda self: self.busy)
    @rule()
    def step(self) -> None:
        before, in_flight = len(self.scheduler), self.ahead is not None and self.ahead.flight is not None
        plan = self._step()
        self.now += 1.0
        progress = plan.rows or in_flight or len(self.scheduler) < before or len(self.scheduler.adapters)
        assert progress, "there are requests, but none makes progress"
        assert plan.num_tokens <= BUDGET

    @precondition(lambda self: len(self.scheduler))
    @rule(at=st.integers(1, 4))
    def step_with_a_failing_allocation(self, at: int) -> None:
        failpoints.configure(f"blocks.take=raise:{at}")
        try:
            self._step()
        finally:
            failpoints.configure("")

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def step_in_which_a_row_fails(self, data: st.DataObject) -> None:
        self.worker.failing = data.draw(st.integers(0, SLOTS - 1))
        self._step()
        self.worker.failing = None

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A stop string is found, maybe with the next row in flight."""
        self.scheduler.finish(data.draw(st.sampled_from(list(self.scheduler.running))), "stop")

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(data.draw(st.sampled_from(list(self.scheduler))), "abort")

    @rule()
    def publish_adapter(self) -> None:
        """New requests get the new version, those that run keep theirs."""
        self.version += 1

    @precondition(lambda self: len(self.scheduler.adapters))
    @rule(key=st.sampled_from(PLACED))
    def lose_adapter(self, key: str) -> None:
        """Requests that wait for it end; it can be named again."""
        self.scheduler.adapters.lose(key, "lost")

    @rule()
    def reset_prefixes(self) -> None:
        self.scheduler.blocks.reset_prefixes()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert all(request.timing.preemptions <= 2 for request in self.requests)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(1000):
            if not self.busy:
                break
            self.step()
        assert not self.busy, "a request never ends"
        self.scheduler.check_integrity()
        for request in self.requests:
            assert request.state is RequestState.FINISHED
            asked = request.submission
            assert request.tokens == solo(
                asked.prompt_ids, len(request.tokens), adapter=asked.adapter, grammar=asked.grammar
            )
            beyond = len(request.tokens) - request.max_len
            assert request.finish_reason != "length" or 0 <= beyond <= (len(FORCED) if asked.grammar else 0)


SchedulerMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestScheduler = pytest.mark.filterwarnings("error")(SchedulerMachine.TestCase)
