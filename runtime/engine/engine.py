"""The step loop: schedule, execute, deliver. Asynchronously the next step is scheduled while one is executed.

`Engine` is synchronous and belongs to one thread. `runtime.service` runs it beside an event loop, and
`runtime.llm` drives it from a script; neither knows what happens inside a step. Knows no HTTP.
"""

import copy
import random
import time
from collections import Counter, deque
from collections.abc import Callable

from runtime.beams import BeamSearches
from runtime.delivery import Delivery
from runtime.errors import AdapterUnavailable, ContextLengthExceeded, InvalidRequest
from runtime.hooks import Hooks
from runtime.messages import FinishReason, Output, StepPlan, StepResult, Submission
from runtime.metrics import Metrics
from runtime.scheduler import Committed, Request, Scheduler
from runtime.tokenizer import Tokenizer
from runtime.workers.executor import AllRowsFailed, Executor, WorkersLost
from runtime.workers.pipeline import Pipeline

MAX_FAILED_STEPS = 3
"""So many steps in a row without one row computed, and the engine gives up."""


LOST = "A process that computes the model was lost; the request can be sent again."


class Engine:
    """Owns the scheduler (and through it the blocks), the executor, and every request's text."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        max_len: int,
        asynchronous: bool = False,
        hooks: Hooks | None = None,
    ) -> None:
        """`max_len` is the longest sequence, prompt and output, that context and block pool can hold.
        `asynchronous`: plan a step while the one before it runs on a thread of its own."""
        self.scheduler = scheduler
        self.max_len = max_len
        self._executor = executor
        self._pipeline = Pipeline(executor)
        self._asynchronous = asynchronous
        self._flights: deque[StepPlan] = deque()
        """Plans that are made and not delivered, in their order."""
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._hooks = hooks or Hooks()
        self.delivery = Delivery(scheduler, tokenizer, metrics, self._hooks, on_end=self._release_adapter)
        self._beams = BeamSearches(scheduler, self.delivery)
        self._adapter_uses: Counter[str] = Counter()
        """Requests that are not finished, by the key of the version that they began with."""
        self._adapters: set[str] = set()
        """Keys that new requests may name."""
        self._leaving: set[str] = set()
        """Keys that no new request may name, in memory for those that still run."""
        self._failed_steps = 0
        self._seen = copy.copy(scheduler.counts)

    # -- the loop ------------------------------------------------------------------------------

    def step(self, *, ahead: bool = True) -> list[Output]:
        """One step: what it added to each request. Empty when there is nothing to do.

        Asynchronously the step that is planned here stays in flight, and what is delivered is the one before.
        Not `ahead`: nothing is in flight afterwards, so that the caller can have the worker to himself.
        """
        ahead = ahead and self._asynchronous and not self.scheduler.guesses
        outputs = [] if ahead else self.settle()
        plan = self.scheduler.schedule(ahead=ahead)
        self._flights.append(plan)
        if not plan.empty:
            self._pipeline.submit(plan, beside=ahead)
        return outputs + self._deliver(leave=1 if ahead and not plan.empty else 0)

    def settle(self) -> list[Output]:
        """Wait for what is in flight, and deliver it."""
        return self._deliver(leave=0)

    def _deliver(self, *, leave: int) -> list[Output]:
        """What the steps in flight added, the oldest first, but for the last `leave` of them."""
        outputs: list[Output] = []
        while len(self._flights) > leave:
            plan = self._flights.popleft()
            for item in self.scheduler.commit(plan, self._result(plan)):
                outputs += self._outputs(item)
            self.observe(plan.num_tokens)
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise AllRowsFailed(f"{self._failed_steps} steps in a row failed")
        return outputs

    def _outputs(self, item: Committed) -> list[Output]:
        searches = item.request.submission.beams is not None
        return self._beams.deliver(item) if searches else [self.delivery.deliver(item)]

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or len(self._flights) > 0

    @property
    def first_tokens_due(self) -> bool:
        """Is there a request that has no token yet?"""
        scheduler = self.scheduler
        return len(scheduler.waiting) > 0 or any(request.num_generated == 0 for request in scheduler.running)

    # -- lost workers --------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the workers are gone. What waits may go on once there are new ones. From any thread."""
        return self._executor.lost

    def on_loss(self, notify: Callable[[], None]) -> None:
        """Have `notify` called, from any thread, when workers are lost while there is nothing to do."""
        self._executor.on_loss(notify)

    def fail_running(self) -> list[Output]:
        """End what was running on lost workers, with an error."""
        outputs = self.settle()
        for request in list(self.scheduler.running):
            self.scheduler.finish(request, "error")
            outputs += self._outputs(Committed(request, [], LOST))
        self.observe()
        return outputs

    def recover(self) -> None:
        """Make new workers, and forget what the lost ones had computed; nothing may be running. Takes as long as
        loading the model does. Raises `WorkersLost` where that is hopeless."""
        self.scheduler.blocks.reset_prefixes()
        self._executor.recover()

    def close(self) -> None:
        """End the workers."""
        self._executor.close()

    # -- requests ------------------------------------------------------------------------------

    def prepare(self, submission: Submission) -> Submission:
        """What hooks make of a submission, checked. To be called once, before `submit`; raises what `check`
        raises, and any `RequestError` with which a hook rejects it."""
        submission = self._hooks.submit(submission)
        self.check(submission)
        return submission

    def check(self, submission: Submission) -> None:
        """Raise `InvalidRequest` or `ContextLengthExceeded` for what can never run."""
        prompt, vocab = submission.prompt_ids, self.tokenizer.vocab_size
        if not prompt:
            raise InvalidRequest("The prompt is empty: it must have at least one token.", param="prompt")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise InvalidRequest(f"Token ids must be from 0 to {vocab - 1}, got {wrong}.", param="prompt")
        wanted = submission.params.max_tokens or 1
        if len(prompt) + wanted > self.max_len:
            raise ContextLengthExceeded(
                f"This server holds at most {self.max_len} tokens of a sequence; the prompt has {len(prompt)} "
                f"and max_tokens asks for {wanted} more. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if len(prompt) < self.max_len else "prompt",
            )

    def submit(self, submission: Submission) -> None:
        """Queue a sequence. Raises what `check` and `Scheduler.submit` raise."""
        self.check(submission)
        if submission.adapter and submission.adapter not in self._adapters:
            raise AdapterUnavailable("The adapter version that this request was for is not loaded any more.")
        params = submission.params
        most = params.max_tokens or self.max_len
        request = Request(
            submission,
            seed=params.seed if params.seed is not None else random.getrandbits(63),
            max_len=min(self.max_len, len(submission.prompt_ids) + most),
            eos_ids=self.tokenizer.eos_ids,
        )
        request.timing.arrival = submission.arrival or time.monotonic()
        try:
            self.scheduler.submit(request)
        except Exception:
            self.metrics.on_rejection("queue_full")
            raise
        if submission.adapter:
            self._adapter_uses[submission.adapter] += 1
        self.delivery.begin(request)
        if submission.beams is not None:
            self._beams.begin(request, submission.beams)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request wherever it is; its slot and blocks are free at once. Unknown ids are fine."""
        request = self.scheduler.get(request_id)
        if request_id in self._beams:
            self._beams.end(request_id, reason)
        elif request is not None:
            self.delivery.finish(request, reason)

    # -- adapters ------------------------------------------------------------------------------

    def prepare_adapter(self, key: str, directory: str) -> None:
        """Read a version's files. The one method for any thread: it touches nothing that a step uses.
        Raises `AdapterInvalid`."""
        self._executor.prepare_adapter(key, directory)

    def load_adapter(self, key: str) -> None:
        """Let requests name a version that was prepared."""
        self._pipeline.in_order(lambda: self._executor.load_adapter(key))
        self._leaving.discard(key)
        self._adapters.add(key)
        self.metrics.on_adapter_loaded(key)

    def unload_adapter(self, key: str) -> None:
        """Refuse new requests for a version, and free its memory once the last request for it has ended."""
        if key in self._adapters:
            self._adapters.discard(key)
            self._leaving.add(key)
        self._let_go(key)

    def _release_adapter(self, request: Request) -> None:
        """A request has ended, and its adapter version with it if it was the last one."""
        if key := request.submission.adapter:
            self._adapter_uses[key] -= 1
            if not self._adapter_uses[key]:
                del self._adapter_uses[key]
            self._let_go(key)

    def _let_go(self, key: str) -> None:
        if key in self._leaving and not self._adapter_uses[key]:
            self._leaving.discard(key)
            self._pipeline.in_order(lambda: self._executor.unload_adapter(key))
            self.metrics.on_adapter_unloaded(key)

    # -- parts of a step -----------------------------------------------------------------------

    def _result(self, plan: StepPlan) -> StepResult:
        """What came of the oldest plan in flight; rows that failed are in it."""
        if plan.empty:
            return StepResult(step=plan.step, slots=[], tokens=[])
        try:
            result = self._pipeline.collect()
        except WorkersLost as lost:
            return StepResult(
                step=plan.step, slots=[], tokens=[], failed={row.slot: f"{LOST} ({lost})" for row in plan.rows}
            )
        except AllRowsFailed:
            self._failed_steps += 1
            failed = {row.slot: "An internal error ended this request." for row in plan.rows}
            return StepResult(step=plan.step, slots=[], tokens=[], failed=failed)
        if len(result.failed) < len(plan.rows):
            self._failed_steps = 0
        return result

    def observe(self, num_tokens: int = 0) -> None:
        """Bring the gauges and counters up to date, after a step of `num_tokens` or after aborts."""
        scheduler, metrics = self.scheduler, self.metrics
        metrics.on_step(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            deferred=scheduler.waiting.num_deferred,
            kv_usage=scheduler.blocks.usage,
            tokens=num_tokens,
        )
        metrics.on_adapter_step(
            running={r.submission.adapter for r in scheduler.running if r.submission.adapter}
            if self._adapter_uses
            else (),
            active=self._adapter_uses.keys(),
        )
        metrics.on_swapped(scheduler.num_swapped)
        if scheduler.counts != self._seen:
            news = scheduler.counts.since(self._seen)
            self._seen = copy.copy(scheduler.counts)
            metrics.on_preemptions(news.preemptions)
            metrics.on_prefix_lookup(news.prefix_queries, news.prefix_hits)
            metrics.on_drafts(news.drafted, news.accepted)
            metrics.on_swap(out=news.swapped_out, back=news.swapped_in)
