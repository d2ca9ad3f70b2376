"""The step loop: schedule, execute, deliver. Asynchronously the next step is scheduled while one is executed.

`Engine` is synchronous and belongs to one thread. `runtime.engine.service` runs it beside an event loop, and
`runtime.llm` drives it from a script; neither depends on what happens inside a step. Independent of HTTP.
"""

import copy
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from runtime.engine.adapters import AdapterFiles, AdapterLoads
from runtime.engine.beams import BeamSearches
from runtime.engine.delivery import Delivery
from runtime.engine.hooks import Hooks
from runtime.errors import AdapterUnavailable, ContextLengthExceeded, InvalidRequest, TooManyRequests
from runtime.messages import (
    ADAPTER_UNLOADED,
    FinishReason,
    Output,
    RidingRow,
    SamplingParams,
    StepPlan,
    StepResult,
    Submission,
    check_ids,
)
from runtime.metrics import CacheShape, EngineLoad, Metrics
from runtime.scheduler import Committed, Request, Scheduler
from runtime.support.counting import count_down
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.text.grammar import GrammarCompiler
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.riding import Ride
from runtime.workers.executor import AllRowsFailed, Executor, Pipeline, RowByRow, WorkersLost
from runtime.workers.recorded_steps import RecordedSteps

MAX_FAILED_STEPS = 3
"""Steps in a row without one row computed, after which the engine gives up if its probe fails as well."""

PROBE = "engine probe"
"""Label of the request that the engine itself makes after a failed step: one token after one token, on the base model.
If it succeeds, the fault lies in the requests, not in the engine."""

MAX_QUEUE_HEAD = 64
"""Waiting requests among which the oldest is looked for: this happens once a step."""

LOST = "A process that computes the model was lost; the request can be sent again."

log = get_logger(__name__)


class Engine:
    """Owns the scheduler (and through it the blocks), the executor, and every request's text."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer,
        metrics: Metrics,
        shape: CacheShape,
        *,
        max_len: int,
        asynchronous: bool = False,
        hooks: Hooks | None = None,
        vocab_size: int | None = None,
        eos_ids: tuple[int, ...] = (),
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`shape`: of the KV cache, for the metrics. `max_len` is the longest sequence, prompt and output, that context
        and block pool can hold. `asynchronous`: plan a step while the one before it runs on a thread of its own.
        `vocab_size`: rows of the model's embedding, all of which are valid as input; default: the tokenizer's.
        `eos_ids`: ids that end an output besides the tokenizer's."""
        self.scheduler = scheduler
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.eos_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *eos_ids)))
        self.grammars = GrammarCompiler(tokenizer, self.eos_ids) if grammars is None else grammars
        """Compiler of the grammars of submissions, for callers: they hand over what compiles."""
        self.max_len = max_len
        self._executor = executor
        self._pipeline = Pipeline(executor)
        self._asynchronous = asynchronous
        self._flights: deque[StepPlan] = deque()
        """Plans that are made and not delivered, oldest first."""
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._gauges = metrics.open_engine(shape)
        self._hooks = hooks or Hooks()
        self.delivery = Delivery(scheduler, self.tokenizer_of, metrics, self._hooks, on_end=self._release_adapter)
        self._beams = BeamSearches(scheduler, self.delivery)
        self._adapter_uses: Counter[str] = Counter()
        """Requests that are not finished, by the key of the version that they began with."""
        self._adapters: set[str] = set()
        """Keys that new requests may name."""
        self._tokenizers: dict[str, Tokenizer] = {}
        """Tokenizers of versions that requests may name and that have tokens of their own."""
        self.adapter_loads = AdapterLoads(scheduler.adapters, executor, self._pipeline, metrics)
        self._leaving: set[str] = set()
        """Keys that no new request may name, kept in memory for requests that still run."""
        self._failed_steps = 0
        self._probe: int | None = None
        """Id of the probe that is under way."""
        self._probe_failed = False
        """The last probe ended with an error."""
        self._abandoned = False
        """The last plan was given up as a whole."""
        self._ridden = False
        """True if the riding tokens of the last plan were computed."""
        self._seen = copy.copy(scheduler.counts)

    # -- the loop ------------------------------------------------------------------------------

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        """See `Executor.kept_widths`."""
        return self._executor.kept_widths

    @property
    def recorded(self) -> RecordedSteps | None:
        """Steps that run as recorded, as CUDA graphs do; None where all are computed launch by launch."""
        return self._executor.recorded if isinstance(self._executor, RowByRow) else None

    def step(self, *, ahead: bool = True, ride: tuple[Ride, int] | None = None) -> list[Output]:
        """One step: what it added to each request. Empty when there is nothing to do.

        Asynchronously the step that is planned here stays in flight, and what is delivered is the one before.
        Not `ahead`: nothing is in flight afterwards, so that the caller can use the worker alone, and some tokens of a
        `ride`, not more than the number, may be computed beside the requests'. That needs `kept_widths`.
        """
        ahead = ahead and self._asynchronous and not self.scheduler.guesses
        outputs = [] if ahead else self.settle()
        self.adapter_loads.advance()
        row = None if ride is None or ahead else self._offer(*ride)
        try:
            plan = self.scheduler.schedule(ahead=ahead, riding=row)
        except Exception:
            return outputs + self._abandon("planning_failed")
        self._flights.append(plan)
        if not plan.empty:
            self._pipeline.submit(plan, beside=ahead)
        outputs += self._deliver(leave=1 if ahead and not plan.empty else 0)
        if ride is not None and row is not None:
            ride[0].settle(row, planned=plan.riding is not None, ridden=self._ridden)
            if ride[0].under_way and row.start and not self.scheduler.riding.holds(row.ride) and not self._ridden:
                ride[0].drop()  # a request has its blocks
        return outputs

    def _offer(self, ride: Ride, most: int) -> RidingRow:
        """The tokens of a ride for the next plan."""
        ride.on_drop = self.scheduler.riding.release
        self._executor.offer(ride)
        self._ridden = False
        return ride.row(most)

    def settle(self) -> list[Output]:
        """Wait for what is in flight, and deliver it."""
        return self._deliver(leave=0)

    def _deliver(self, *, leave: int) -> list[Output]:
        """Additions of the steps in flight, the oldest first, except the last `leave` of them."""
        outputs: list[Output] = []
        while len(self._flights) > leave:
            plan = self._flights.popleft()
            result = self._result(plan)
            self._ridden = result.ridden
            try:
                committed = self.scheduler.commit(plan, result)
            except Exception:
                outputs += self._abandon("booking_failed")
                break
            self._abandoned = False
            if len(result.failed) < len(plan.rows):
                self._failed_steps, self._probe_failed = 0, False
            for item in committed:
                outputs += self._outputs(item)
            self.observe()
            self._give_up_or_probe()
        return outputs

    def _outputs(self, item: Committed) -> list[Output]:
        """Outputs of an item for its client. An exception ends its request, and no other."""
        request = item.request
        if request.id == self._probe:
            self._on_probe(item)
            return []
        searches = request.submission.beams is not None
        try:
            failpoint("engine.deliver", request.submission.request_id)
            return self._beams.deliver(item) if searches else [self.delivery.deliver(item)]
        except Exception:
            log.exception("delivery_failed", request_id=request.submission.request_id)
            return self._beams.fail(item) if searches else [self.delivery.fail(item)]

    # -- failures that no single row explains ----------------------------------------------------

    def _abandon(self, event: str) -> list[Output]:
        """End all running requests and, if that did not help the last time, all waiting ones too. Called while an
        exception from planning or booking is handled."""
        log.exception(event, running=len(self.scheduler.running), waiting=len(self.scheduler.waiting))
        self._flights.clear()
        self._pipeline.discard()
        outputs: list[Output] = []
        for item in self.scheduler.abandon(waiting=self._abandoned):
            outputs += self._outputs(item)
        self._abandoned = True
        self._failed_steps += 1
        self.observe()
        self._give_up_or_probe()
        return outputs

    def _give_up_or_probe(self) -> None:
        """After a step: find out whether the engine or a request is to blame for one that failed as a whole.
        Raises `AllRowsFailed` when it is the engine."""
        if not self._failed_steps:
            return
        if self._failed_steps >= MAX_FAILED_STEPS and self._probe_failed:
            raise AllRowsFailed(f"{self._failed_steps} steps in a row failed, the engine's own probe among them")
        if self._probe is None:
            params = SamplingParams(max_tokens=1, temperature=0.0)
            probe = Request(
                Submission(request_id=PROBE, prompt_ids=[0], params=params, arrival=time.monotonic()), seed=0, max_len=2
            )
            self._probe = probe.id
            self.scheduler.enqueue(probe)

    def _on_probe(self, item: Committed) -> None:
        self._probe = None
        self._probe_failed = not item.tokens
        self.scheduler.finish(item.request, "length" if item.tokens else "error")

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or len(self._flights) > 0

    @property
    def only_reads(self) -> bool:
        """True if there is nothing to do before an adapter version is read."""
        return not self._flights and not self.adapter_loads.has_ended and self.scheduler.only_reads

    @property
    def prefilling(self) -> bool:
        """True if some request has no token yet and does not wait for an adapter. Of a long queue only the head
        counts."""
        return any(self._without_token())

    @property
    def waiting_since(self) -> float | None:
        """Arrival of the oldest request that has no token yet, by `time.monotonic`; None: all have one. Of a long queue
        only the head counts, and of the background none."""
        arrivals = (one.timing.arrival for one in self._without_token() if not one.submission.background)
        return min(arrivals, default=None)

    def _without_token(self) -> Iterator[Request]:
        requests = chain(self.scheduler.running, islice(self.scheduler.waiting.policy, MAX_QUEUE_HEAD))
        return (one for one in requests if one.num_generated == 0)

    # -- lost workers --------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """True if the workers are lost. Waiting requests may continue once there are new ones. Callable from any
        thread."""
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

    def unload(self) -> None:
        """Let go of workers that were closed, with weights and cache. Nothing can be computed any more."""
        self._gauges.close()
        if isinstance(self._executor, RowByRow):
            self._executor.unload()
        del self._executor, self._pipeline

    # -- requests ------------------------------------------------------------------------------

    def prepare(self, submission: Submission) -> Submission:
        """Apply the hooks to a checked submission. Call it once, before `submit_all`. Raises what `check` raises of one
        that a hook has changed, and any `RequestError` with which a hook rejects it."""
        prepared = self._hooks.submit(submission)
        if prepared is not submission:
            self.check(prepared)
        return prepared

    def check(self, submission: Submission) -> None:
        """Raise `InvalidRequest` or `ContextLengthExceeded` for a prompt that can never run. For submissions that were
        not made by the API, which has checked its own; those have no other check behind it."""
        prompt, params = submission.prompt_ids, submission.params
        if not prompt:
            raise InvalidRequest("The prompt is empty: it must have at least one token.", param="prompt")
        num_output = 0 if submission.pooling is not None else params.max_tokens or 1
        if len(prompt) + num_output > self.max_len:
            raise ContextLengthExceeded(
                f"This server holds at most {self.max_len} tokens of a sequence; the prompt has {len(prompt)} "
                f"and max_tokens asks for {num_output} more. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if len(prompt) < self.max_len else "prompt",
            )
        own = self._tokenizers.get(submission.adapter)
        check_ids(prompt, self.vocab_size if own is None else own.vocab_size, "prompt")

    def submit(self, submission: Submission) -> None:
        """Check and queue a sequence. Raises what `check`, `Scheduler.check_room` and `submit_all` raise."""
        self.check(submission)
        self.check_room([submission])
        self.submit_all([submission])

    def check_room(self, submissions: Sequence[Submission], *, num_requests: int | None = None) -> None:
        """Raise `TooManyRequests` when the queue has no room for the sequences of a request; `num_requests` as
        `Scheduler.check_room` has it. From any thread."""
        prompts = {id(one.prompt_ids): len(one.prompt_ids) for one in submissions}  # choices share their prompt
        try:
            self.scheduler.check_room(sum(prompts.values()), count=len(submissions), num_requests=num_requests)
        except TooManyRequests:
            self.metrics.on_rejection("queue_full")
            raise

    def submit_all(self, submissions: Sequence[Submission]) -> None:
        """Queue the sequences of a request, all or none. They were checked, and there was room for them. Raises
        `AdapterUnavailable`."""
        begun: list[int] = []
        try:
            for submission in submissions:
                self._begin(submission)
                begun.append(submission.id)
        except Exception:
            for name in begun:
                self.abort(name)
            raise

    def _begin(self, submission: Submission) -> None:
        if submission.adapter and submission.adapter not in self._adapters:
            raise AdapterUnavailable(ADAPTER_UNLOADED)
        params = submission.params
        most = 0 if submission.pooling is not None else params.max_tokens or self.max_len
        request = Request(
            submission,
            seed=params.seed if params.seed is not None else random.getrandbits(63),
            max_len=min(self.max_len, len(submission.prompt_ids) + most),
            eos_ids=self.eos_ids,
            bad_word_ids=self.tokenizer_of(submission.adapter).bad_word_ids(params.bad_words)
            if params.bad_words
            else None,
        )
        request.timing.arrival = submission.arrival or time.monotonic()
        self.scheduler.enqueue(request)
        try:
            self.delivery.begin(request)
            if submission.beams is not None:
                self._beams.begin(request, submission.beams)
        except Exception:
            self.scheduler.finish(request, "error")
            self.delivery.withdraw(request)
            raise
        if submission.adapter:
            self._adapter_uses[submission.adapter] += 1

    def abort(self, sequence: int, reason: FinishReason = "abort") -> None:
        """End a sequence in any state; its slot and blocks are free at once. Unknown ids are fine."""
        request = self.scheduler.get(sequence)
        if sequence in self._beams:
            self._beams.end(sequence, reason)
        elif request is not None:
            self.delivery.finish(request, reason)

    # -- adapters ------------------------------------------------------------------------------

    def prepare_adapter(self, key: str, directory: str) -> None:
        """Read a version's files. The one method for any thread: it touches nothing that a step uses.
        Raises `AdapterInvalid`."""
        self._executor.prepare_adapter(key, directory)

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the versions in memory, and of those that requests may name."""
        return frozenset(self._adapters | self._leaving)

    def tokenizer_of(self, key: str) -> Tokenizer:
        """The tokenizer of a version in memory, or of the base (an empty key)."""
        return self._tokenizers.get(key, self.tokenizer)

    def add_adapter(self, key: str, files: AdapterFiles, tokenizer: Tokenizer | None = None) -> None:
        """Let requests name a version, which is loaded as they need it: at most `adapters.max_loaded` of these are in
        memory at once. `tokenizer`: its own, where it has tokens of its own."""
        self.adapter_loads.add(key, files)
        self._admit_adapter(key, tokenizer)

    def load_adapter(self, key: str, tokenizer: Tokenizer | None = None) -> None:
        """Let requests name a version that was prepared; it stays in memory until it is unloaded. `tokenizer`: its own,
        where it has tokens of its own."""
        self._pipeline.in_order(lambda: self._executor.load_adapter(key))
        self._admit_adapter(key, tokenizer)
        self.metrics.on_adapter_loaded(key)

    def _admit_adapter(self, key: str, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None:
            self._tokenizers[key] = tokenizer
        self._leaving.discard(key)
        self._adapters.add(key)

    def unload_adapter(self, key: str) -> None:
        """Refuse new requests for a version, end those that wait for it to be loaded, and free its memory once the last
        request for it has ended."""
        if key in self._adapters:
            self._adapters.discard(key)
            self._leaving.add(key)
            self.scheduler.adapters.lose(key, ADAPTER_UNLOADED)
        self._let_go(key)

    def _release_adapter(self, request: Request) -> None:
        """A request has ended, and its adapter version with it if it was the last one."""
        if key := request.submission.adapter:
            count_down(self._adapter_uses, key)
            self._let_go(key)

    def _let_go(self, key: str) -> None:
        if key in self._leaving and not self._adapter_uses[key]:
            self._leaving.discard(key)
            self._tokenizers.pop(key, None)
            self.adapter_loads.remove(key)
            self._pipeline.in_order(lambda: self._executor.unload_adapter(key))
            self.metrics.on_adapter_unloaded(key)

    # -- parts of a step -----------------------------------------------------------------------

    def _result(self, plan: StepPlan) -> StepResult:
        """Result of the oldest plan in flight, failed rows included."""
        if plan.empty:
            return StepResult(step=plan.step, slots=[], tokens=[])
        try:
            return self._pipeline.collect()
        except WorkersLost as lost:
            return StepResult(
                step=plan.step, slots=[], tokens=[], failed={row.slot: f"{LOST} ({lost})" for row in plan.rows}
            )
        except Exception:
            log.exception("step_failed", step=plan.step, rows=len(plan.rows))
            self._failed_steps += 1
            failed = {row.slot: "An internal error ended this request." for row in plan.rows}
            return StepResult(step=plan.step, slots=[], tokens=[], failed=failed)

    def observe(self) -> None:
        """Bring the gauges and counters up to date, after a step or after aborts. Never raises."""
        try:
            self._observe()
        except Exception:
            log.exception("metrics_failed")

    def _observe(self) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        blocks = scheduler.blocks
        self._gauges.on_step(
            EngineLoad(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                deferred=scheduler.waiting.num_deferred,
                without_adapter=len(scheduler.adapters),
                used_blocks=blocks.num_blocks - blocks.num_free,
                swapped_blocks=scheduler.num_swapped,
            )
        )
        self._gauges.on_adapter_step(
            running={r.submission.adapter for r in scheduler.running if r.submission.adapter}
            if self._adapter_uses
            else frozenset(),
            active=self._adapter_uses.keys(),
        )
        if scheduler.counts != self._seen:
            news = scheduler.counts.since(self._seen)
            self._seen = copy.copy(scheduler.counts)
            metrics.on_preemptions(news.preemptions)
            metrics.on_prefix_lookup(news.prefix_queries, news.prefix_hits)
            metrics.on_drafts(news.drafted, news.accepted, drafts=news.drafts)
            metrics.on_prompt_pace(
                news.paced_steps, news.paced_tokens, late=news.late_steps, reserve=scheduler.prompt_reserve
            )
            metrics.on_swap(out=news.swapped_out, back=news.swapped_in)
