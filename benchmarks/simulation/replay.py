"""Plays a trace to the scheduler that serves real requests; only the device and the clock are made up."""

from collections.abc import Iterable, Iterator

from benchmarks.simulation.device import Device, Model
from benchmarks.simulation.outcome import Outcome
from benchmarks.simulation.trace import LONGEST, Arrival, Traffic
from runtime.blocks import BlockManager
from runtime.messages import SamplingParams, StepPlan, StepResult, Submission
from runtime.scheduler import Committed, Request, Scheduler
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings

BLOCK = 16
CONTEXT = 2 * LONGEST + 512
"""Tokens: the longest prompt and output of a trace, and a shared beginning."""

SAMPLE_EVERY = 8
"""Steps between two looks at the pool."""


class Replay:
    """One run. Deterministic: the same trace, policy and device give the same outcome."""

    def __init__(
        self,
        traffic: Traffic,
        device: Device,
        model: Model,
        *,
        policy: str = "fcfs",
        max_running: int = 256,
        max_batched_tokens: int = 2048,
        kv_tokens: int | None = None,
    ) -> None:
        """`kv_tokens`: what the pool holds; by default what the device has memory for."""
        self._traffic = traffic
        self._device = device
        self._model = model
        self._now = 0.0
        tokens = kv_tokens or int(device.kv_memory / model.kv_bytes_per_token)
        self._blocks = BlockManager(max(tokens, CONTEXT) // BLOCK, BLOCK)
        self._scheduler = Scheduler(
            self._blocks,
            make_policy(policy),
            SchedulerSettings(
                max_batched_tokens=max_batched_tokens,
                max_running=max_running,
                max_waiting=traffic.requests,
                max_waiting_tokens=traffic.requests * CONTEXT,
            ),
            clock=lambda: self._now,
        )
        self._arrivals: dict[int, Arrival] = {}
        self._count = 0
        self._waste = 0.0
        self._looks = 0
        self._contested = len(traffic.tenants) > 1
        self._service = [0.0] * len(traffic.tenants)
        self._gap_start: list[float] | None = None
        self._outcome = Outcome()

    def run(self) -> Outcome:
        coming = Coming(self._traffic.arrivals())
        scheduler, outcome = self._scheduler, self._outcome
        while len(scheduler) or coming:
            if not len(scheduler):
                self._now = max(self._now, coming.next_at)
            for arrival in coming.until(self._now):
                self._submit(arrival)
            plan = scheduler.schedule()
            result = self._execute(plan)
            if outcome.steps % SAMPLE_EVERY == 0:
                self._look()
            for item in scheduler.commit(plan, result):
                self._book(item)
            outcome.steps += 1
        outcome.seconds = self._now
        outcome.preemptions = scheduler.counts.preemptions
        outcome.cached_share = scheduler.counts.prefix_hits / max(1, scheduler.counts.prefix_queries)
        outcome.kv_waste = self._waste / max(1, self._looks)
        return outcome

    def _submit(self, arrival: Arrival) -> None:
        number = self._count = self._count + 1
        shared = [-2 - arrival.prefix] * self._traffic.prefix_tokens if arrival.prefix >= 0 else []
        submission = Submission(
            request_id=str(number),
            prompt_ids=[*shared, number, *range(arrival.prompt - 1)],
            params=SamplingParams(ignore_eos=True),
            priority=arrival.priority,
            tenant=str(arrival.tenant),
            arrival=arrival.at,
            deadline=arrival.deadline,
        )
        self._arrivals[submission.id] = arrival
        request = Request(submission, seed=0, max_len=len(submission.prompt_ids) + arrival.output)
        self._scheduler.submit(request)

    def _execute(self, plan: StepPlan) -> StepResult:
        """Let the time pass that the device would need; every token is a 7."""
        context = sum(row.start + row.count for row in plan.rows)
        self._now += self._model.step_seconds(self._device, plan.num_tokens, context)
        slots = [row.slot for row in plan.rows if row.sample]
        return StepResult(step=plan.step, slots=slots, tokens=[7] * len(slots))

    def _book(self, item: Committed) -> None:
        request, timing = item.request, item.request.timing
        if not item.tokens:
            del self._arrivals[request.id]
            self._outcome.missed += 1
            return
        if self._contested:
            tenant = self._arrivals[request.id].tenant
            if timing.first_token is None:
                self._service[tenant] += request.prompt_len
            self._service[tenant] += 2 * len(item.tokens)
        if timing.first_token is None:
            timing.first_token = self._now
        if len(request.tokens) < request.max_len:
            return
        self._scheduler.finish(request, "length")
        arrival = self._arrivals.pop(request.id)
        self._outcome.output_tokens += request.num_generated
        self._outcome.served.add(
            priority=arrival.priority,
            ttft=timing.first_token - arrival.at,
            tpot=(self._now - timing.first_token) / max(1, request.num_generated - 1),
        )

    def _look(self) -> None:
        held = (self._blocks.num_blocks - self._blocks.num_free) * BLOCK
        used = sum(len(request.tokens) for request in self._scheduler.running)
        if held and used <= held:  # with shared blocks more tokens are held than there is memory
            self._waste += 1 - used / held
            self._looks += 1
        if self._contested and self._both_wait():
            start = self._gap_start = self._gap_start or list(self._service)
            gap = (self._service[0] - start[0]) - (self._service[1] - start[1])
            self._outcome.service_gap = max(self._outcome.service_gap, abs(gap))
        else:
            self._gap_start = None

    def _both_wait(self) -> bool:
        """Has each of the two busiest tenants a request waiting?"""
        missing = {"0", "1"}
        for request in self._scheduler.waiting:
            missing.discard(request.submission.tenant)
            if not missing:
                return True
        return False


class Coming:
    """Arrivals that have not happened yet, one at a time: a million of them take no memory."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        self._iterator = iter(arrivals)
        self._next = next(self._iterator, None)

    def __bool__(self) -> bool:
        return self._next is not None

    @property
    def next_at(self) -> float:
        assert self._next is not None
        return self._next.at

    def until(self, now: float) -> Iterator[Arrival]:
        while self._next is not None and self._next.at <= now:
            yield self._next
            self._next = next(self._iterator, None)
