"""The engine on its own thread, seen from the event loop.

The engine thread takes messages from an inbox, steps while there is work, and sleeps on a condition
when there is none. Outputs cross back with one `call_soon_threadsafe` a step. Model steps never run
on the event loop, and the scheduler is never touched from two threads.
"""

import asyncio
import atexit
import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runtime.adapters.card import Card, read_card
from runtime.checkpoints.peft import AdapterInvalid
from runtime.engine.adapters import AdapterFiles
from runtime.engine.assembly import Assembled, assemble
from runtime.engine.delivery import OutputStream
from runtime.errors import Conflict, EngineFailure, EngineUnavailable, RequestError
from runtime.messages import ROW_FAILED, Output, Submission
from runtime.metrics import Metrics
from runtime.model.model import backend_of, gpu_usage, gpus
from runtime.support.counting import count_down
from runtime.support.logs import get_logger
from runtime.support.machine import Gpu
from runtime.support.threads import call_in_fresh_thread, run_in_fresh_thread
from runtime.text.reasoning import reasoning_format
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.riding import Ride
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary


# -- gathering -------------------------------------------------------------------------------------
#
# Short delay before a new request begins, so that those right behind it join the same step: requests that ran together
# often end together, and if the first of the next ones began at once, the others would wait for its prompt.

LONGEST = 0.005
"""Longest delay, in seconds."""

SHARE = 0.25
"""Longest delay, as a share of the time of a usual step."""


class Gathering:
    """Decides on the delay before each step. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._most = 0
        """Requests that ran at once since the last time that none did."""
        self._until = math.inf

    def seconds(self, *, running: int, waiting: int, step: float, now: float) -> float:
        """Seconds to wait for more requests before the next step; 0 for none. `step`: seconds that a step usually
        takes.

        There is no delay while anything runs, nor after requests that came one at a time.
        """
        if running or not waiting:
            self._most = max(self._most, running)
            self._until = math.inf
            return 0.0
        self._until = min(self._until, now + min(LONGEST, SHARE * step))
        if waiting < self._most and now < self._until:
            return self._until - now
        self._most = waiting
        return 0.0


class Background(Protocol):
    """Work between steps, in small slices. All methods run on the engine thread, but any may call `ready`."""

    @property
    def ready(self) -> bool:
        """True if there is work now. Without work, the thread sleeps until it is woken."""

    def idle(self) -> None:
        """Work while nothing else is to be done, and return soon."""

    def ride(self) -> tuple[Ride, int] | None:
        """Tokens to compute in the step that comes next, which decodes, and their number at the most; None: none."""

    def between_steps(self, step_seconds: float, *, decoding: bool, waiting_since: float | None) -> None:
        """Work after a step of `step_seconds`, while the next one waits. `decoding`: it did nothing else;
        `waiting_since`: arrival of the oldest request that has no token yet, by `time.monotonic`."""


# The longest that the exit of a process waits for the step of a thread that was not stopped.
ABANDONED_SECONDS = 2.0

# The longest that the engine thread waits for the read of an adapter before it looks for requests whose time is up.
MAX_READ_WAIT_SECONDS = 0.1

T = TypeVar("T")

log = get_logger(__name__)


class EngineService:
    """Submissions in, output streams out. All methods but the thread's own belong to the event loop."""

    def __init__(self, settings: Settings, assembled: Assembled, label: str | None = None) -> None:
        self.settings = settings
        self.engine = assembled.engine
        self.tokenizer = assembled.engine.tokenizer
        self.metrics = assembled.engine.metrics
        self.reasoning = reasoning_format(self.tokenizer.chat_template, settings.model.reasoning_parser)
        """Form of the model's reasoning; None if it is not split from its answers."""
        self.model_name = assembled.model_name
        self.label = label or assembled.model_name
        """The model as a server tells it apart from those that it serves under the same name."""
        self.model_source = assembled.model_source
        self.max_model_len = assembled.engine.max_len
        self.vocab_size = assembled.engine.vocab_size
        self.eos_ids = assembled.engine.eos_ids
        self.sampling_defaults = assembled.sampling_defaults
        self.block_size = assembled.block_size
        self.num_blocks = assembled.num_blocks
        self.lora_base = assembled.lora_base
        self.decoder = assembled.decoder
        self.make_run = assembled.make_run
        self.adapters: AdapterLibrary | None = None
        """The adapters that requests can name, once the state directory is open."""
        self.created = int(time.time())
        self.died = asyncio.Event()
        """Set when the engine thread ended by itself: nothing can be served any more."""
        self._drained = asyncio.Event()
        """Set whenever the last stream is gone."""
        self._streams: dict[int, OutputStream] = {}
        """Output streams by the id of their sequence."""
        self._submissions: dict[int, Submission] = {}
        """Submissions of the same sequences, by id."""
        self._labels: Counter[str] = Counter()
        """Number of sequences by the `request_id` that they share."""
        self._adapter_streams: Counter[str] = Counter()
        self._calls: set[asyncio.Future[Any]] = set()
        self._reverts: dict[str, asyncio.Task[None]] = {}
        """Loads of adapters, by key, that are being reverted: their callers were cancelled."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self._leaving = False
        """The server is shutting down."""
        self._busy_since: float | None = None
        """Time at which the engine thread began its current work; None while it waits for work."""
        self._gathering = Gathering()
        self.background: Background | None = None
        """Work of the engine thread between steps, and while there are none."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def load(cls, settings: Settings, metrics: Metrics | None = None, *, label: str | None = None) -> "EngineService":
        """Read the weights and build everything; blocks for seconds. `metrics`: see `assemble`; `label`: by default the
        model's name. Raises `ModelLoadError`."""
        return cls(settings, run_in_fresh_thread(assemble, settings, metrics), label)

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread. Called in the running event loop that will receive the outputs."""
        self._loop = asyncio.get_running_loop()
        self.engine.on_loss(lambda: self.on_engine_thread(lambda: None))
        self.engine.adapter_loads.notify = lambda: self.on_engine_thread(lambda: None)
        self._thread.start()
        atexit.register(self._end_thread)

    def drain(self, *, leaving: bool = False) -> None:
        """Refuse new requests from now on; running ones and training continue. `leaving`: for good."""
        self._draining = True
        self._leaving = self._leaving or leaving

    def end_drain(self) -> None:
        """Take requests again, unless the server is leaving."""
        self._draining = self._leaving

    async def stop(
        self, drain_timeout: float, *, patience: float | None = None, why: str = "The server is shutting down."
    ) -> None:
        """Refuse new requests, give the running ones `drain_timeout` seconds, abort the rest, end the thread.
        `patience`: seconds that it may take for what it is doing; by default `server.drain_timeout`. `why`: message
        for the requests that are aborted."""
        self.drain(leaving=True)
        if self._streams:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_timeout)
        for stream in list(self._streams.values()):
            self.abort(stream.id)
            stream.fail(EngineUnavailable(why))
        self._stopping = True
        self.on_engine_thread(lambda: None)
        atexit.unregister(self._end_thread)
        if self.engine.lost:
            await asyncio.to_thread(self.engine.close)  # new workers would be waited for
        if self._thread.ident is not None:
            # A step that hangs must not keep the process: the thread is a daemon, and so is the one that waits for it.
            await call_in_fresh_thread(
                self._thread.join, self.settings.server.drain_timeout if patience is None else patience
            )
        self._refuse_calls("The server is shutting down.")
        if not self._thread.is_alive():
            await call_in_fresh_thread(self.engine.close)

    def unload(self) -> None:
        """Let go of weights and cache, after `stop`."""
        self.background = None
        self.engine.unload()
        vars(
            self.decoder
        ).clear()  # its fused pass refers to it, and a server's objects are frozen: nothing collects it
        del self.decoder, self.make_run

    def _end_thread(self) -> None:
        """End the engine thread where `stop` was not called. Python ends a daemon thread in the middle of a C++ call,
        and C++ then aborts the process: "terminate called without an active exception"."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # the event loop that it writes to is closed
            self.on_engine_thread(lambda: None)
        self._thread.join(ABANDONED_SECONDS)

    @property
    def kernels(self) -> str | None:
        """Backend of the ops; None where ranks compute."""
        return backend_of(self.decoder)

    @property
    def gpus(self) -> list[Gpu]:
        """GPUs of this machine."""
        return gpus()

    def scrape(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the form that `accept` asks for, and its content type. Any thread; blocks for milliseconds."""
        self.metrics.on_gpus(gpu_usage())
        return self.metrics.render(accept)

    @property
    def healthy(self) -> bool:
        """False when the thread is dead, or anything that it does takes longer than `server.step_timeout`: a step, a
        slice of training, a message."""
        started = self._busy_since
        stuck = started is not None and time.monotonic() - started > self.settings.server.step_timeout
        return self._thread.is_alive() and not stuck

    @property
    def ready(self) -> bool:
        return self.healthy and not self._draining and not self.engine.lost

    @property
    def num_running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.engine.scheduler.waiting)

    @property
    def kv_usage(self) -> float:
        return self.engine.scheduler.blocks.usage

    # -- requests ------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> OutputStream:
        """Check a request of one sequence and hand it to the engine. Raises what `Engine.check` and `submit_all`
        raise."""
        self.engine.check(submission)
        return self.submit_all([submission])[0]

    def submit_all(self, submissions: Sequence[Submission]) -> list[OutputStream]:
        """Hand the sequences of one request, which were checked, to the engine, all or none. Raises what
        `Engine.prepare` raises, `TooManyRequests`, `Conflict` while another request with their `request_id` is alive,
        `EngineUnavailable` when draining or dead."""
        if self._draining or not self._thread.is_alive():
            why = "The server takes no new requests." if self._draining else "The engine is not running."
            raise EngineUnavailable("The server is shutting down." if self._leaving else why)
        self._require_workers()
        for label in {one.request_id for one in submissions}:
            if label in self._labels:
                raise Conflict(f"A request with id {label!r} is already running.", param="request_id")
        prepared = [self.engine.prepare(submission) for submission in submissions]
        self.engine.check_room(prepared, num_requests=len(self._streams))
        streams = [self._open(submission) for submission in prepared]
        self.on_engine_thread(lambda: self._submit(prepared))
        return streams

    def _open(self, submission: Submission) -> OutputStream:
        self._submissions[submission.id] = submission
        self._labels[submission.request_id] += 1
        if submission.adapter:
            self._adapter_streams[submission.adapter] += 1
        stream = self._streams[submission.id] = OutputStream(submission.id, self.abort)
        return stream

    def abort(self, sequence: int) -> None:
        """Take a sequence out of the engine before its next step. Unknown and finished ids are fine."""
        if self._forget(sequence):
            self.on_engine_thread(lambda: self.engine.abort(sequence))

    async def reset_prefixes(self) -> int:
        """Forget all cached prefixes. Returns how many blocks could have been found. Raises `EngineUnavailable`."""
        return await self.call(self.engine.scheduler.blocks.reset_prefixes)

    # -- adapters ------------------------------------------------------------------------------

    def set_adapters(self, library: "AdapterLibrary | None") -> None:
        """Serve these by name. On the event loop, before the first request."""
        self.adapters = library

    async def add_adapter(self, key: str, files: AdapterFiles) -> None:
        """Let requests name a version, whose files are checked first. It is loaded as they need it. Raises what `files`
        does, `AdapterInvalid`, `EngineUnavailable`."""
        self._require_workers()
        tokenizer = await asyncio.to_thread(lambda: self._tokenizer_in(Path(files())))
        await self.call(lambda: self.engine.add_adapter(key, files, tokenizer))

    async def warm_adapter(self, key: str) -> None:
        """Read a version that was added, and load it if there is room. Raises `AdapterInvalid`, `OSError`,
        `EngineUnavailable`."""
        engine = self.engine
        if not await self.call(lambda: engine.scheduler.adapters.begin_read(key)):
            return
        try:
            await call_in_fresh_thread(engine.adapter_loads.read, key)
        except Exception as error:
            await self.call(partial(engine.adapter_loads.warm, key, error))
            raise
        await self.call(partial(engine.adapter_loads.warm, key, None))

    def adapter_loaded(self, key: str) -> bool:
        """True if a version that was added is in memory."""
        return self.engine.scheduler.adapters.holds(key)

    async def load_adapter(self, key: str, directory: str) -> None:
        """Read an adapter version's files beside the engine, then let requests name it, in a place of its own. When the
        caller is cancelled, the load still runs to its end, and the adapter is unloaded then. Raises `AdapterInvalid`,
        `EngineUnavailable`."""
        while key in self._reverts:
            await asyncio.wait([self._reverts[key]])
        self._require_workers()
        load = asyncio.ensure_future(self._load_adapter(key, directory))
        try:
            await asyncio.shield(load)
        except asyncio.CancelledError:
            self._reverts[key] = asyncio.ensure_future(self._revert(key, load))
            raise

    async def _revert(self, key: str, load: asyncio.Future[None]) -> None:
        """Unload an adapter once its load has ended, however it ends."""
        try:
            await asyncio.wait([load])
            if not load.cancelled() and load.exception() is None:
                await self.unload_adapter(key)
        except EngineUnavailable:  # its memory goes with the engine
            log.info("reverted_adapter_gone", key=key)
        finally:
            self._reverts.pop(key, None)

    async def _load_adapter(self, key: str, directory: str) -> None:
        tokenizer = await asyncio.to_thread(self._tokenizer_in, Path(directory))
        await call_in_fresh_thread(self.engine.prepare_adapter, key, directory)
        await self.call(lambda: self.engine.load_adapter(key, tokenizer))

    def _tokenizer_in(self, directory: Path) -> Tokenizer | None:
        card = read_card(directory)
        try:
            return self.tokenizer_of(card)
        except ValueError as error:
            raise AdapterInvalid(f"The adapter's tokens do not fit the model: {error}.") from None

    def tokenizer_of(self, card: Card) -> Tokenizer | None:
        """The tokenizer of an adapter with tokens of its own; None where it is the base's. Takes a second the first
        time. Raises `ValueError` where its tokens do not fit."""
        if not card.changes_tokens:
            return None
        return self.tokenizer.with_tokens(card.tokens, rows=card.vocab_size, eos_id=card.eos_id)

    async def unload_adapter(self, key: str) -> None:
        """Refuse new requests for a version. Its memory is released once the last one for it has ended."""
        await self.call(lambda: self.engine.unload_adapter(key))

    def adapter_in_use(self, key: str) -> bool:
        """True if some request for this version is not answered yet."""
        return key in self._adapter_streams

    async def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, done on the engine's thread between two steps. Raises what it raises, and
        `EngineUnavailable` where no engine runs."""
        if not self._thread.is_alive() or self._stopping:
            raise EngineUnavailable("The engine is not running.")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():  # the caller has left
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            try:
                result = work()
            except Exception as error:
                self.on_event_loop(settle, None, error)
            else:
                self.on_event_loop(settle, result, None)

        self.on_engine_thread(run)
        return await future

    def on_engine_thread(self, work: Callable[[], None]) -> None:
        """Run `work` on the engine thread before its next step. Callable from any thread; wakes the engine thread."""
        with self._wake:
            self._inbox.append(work)
            self._wake.notify()

    def _require_workers(self) -> None:
        if not self._thread.is_alive():
            raise EngineUnavailable("The engine is not running.")
        if self.engine.lost:
            raise EngineUnavailable(
                "A process that computes the model was lost; the model is being loaded again. Try again in a moment."
            )

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                if output.finish_reason is not None:
                    self._forget(output.id)
                stream.put(output)

    def _forget(self, sequence: int) -> bool:
        """Drop a stream; False when it was gone already."""
        if self._streams.pop(sequence, None) is None:
            return False
        submission = self._submissions.pop(sequence)
        count_down(self._labels, submission.request_id)
        if submission.adapter:
            count_down(self._adapter_streams, submission.adapter)
        if not self._streams:
            self._drained.set()
        return True

    def _fail(self, sequences: Sequence[int], error: RequestError) -> None:
        for sequence in sequences:
            stream = self._streams.get(sequence)
            if stream is not None:
                self._forget(sequence)
                stream.fail(error)

    def _refuse_calls(self, reason: str) -> None:
        """Answer every call that the engine thread will no longer reach."""
        for call in list(self._calls):
            if not call.done():
                call.set_exception(EngineUnavailable(reason))

    # -- the engine thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                if self.engine.lost:
                    self._recover()
                elif self.engine.busy:
                    if not self._gather():
                        if self.engine.only_reads:
                            self._sleep(MAX_READ_WAIT_SECONDS)
                        self._step()
                elif self.background is not None:
                    self._train(self.background.idle)
            self._take_messages()  # aborts among them
            self._busy_since = time.monotonic()
            self.engine.settle()
        except Exception:
            log.exception("engine_died")
            self.on_event_loop(self._bury)
        else:
            self.on_event_loop(self._refuse_calls, "The server is shutting down.")
        finally:
            self._busy_since = None

    def _recover(self) -> None:
        self._busy_since = None  # it takes as long as loading the model, and has a deadline of its own
        self.on_event_loop(self._dispatch, self.engine.fail_running())
        self.engine.recover()

    def _train(self, work: Callable[[], None]) -> None:
        """Run the background work. An exception from it never affects requests."""
        self._busy_since = time.monotonic()
        try:
            work()
        except Exception:
            log.exception("background_failed")

    def _gather(self) -> bool:
        """Wait for more requests where some are likely on their way. False: there is nothing to wait for."""
        scheduler = self.engine.scheduler
        seconds = self._gathering.seconds(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            step=scheduler.step_seconds,
            now=time.monotonic(),
        )
        if seconds:
            self._sleep(seconds)
        return seconds > 0

    def _sleep(self, seconds: float) -> None:
        """Wait for a message, for `seconds` at most."""
        self._busy_since = None
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(seconds)

    def _step(self) -> None:
        background = self.background if self.background is not None and self.background.ready else None
        prefilling = background is not None and self.engine.prefilling
        self._busy_since = began = time.monotonic()
        ride = None if background is None or prefilling else background.ride()
        outputs = self.engine.step(ahead=background is None, ride=ride)
        self._busy_since = time.monotonic()
        self.on_event_loop(self._dispatch, outputs)
        if background is not None and self.engine.busy:
            between = partial(
                background.between_steps,
                time.monotonic() - began,
                decoding=not prefilling,
                waiting_since=self.engine.waiting_since if prefilling else None,
            )
            self._train(between)

    def _take_messages(self) -> None:
        """Process the messages in the inbox; wait for one when there is nothing else to do."""
        with self._wake:
            while not self._inbox and not self._has_work and not self._stopping:
                self._busy_since = None
                self._wake.wait()
        changed = bool(self._inbox)
        while self._inbox:
            self._busy_since = time.monotonic()
            work = self._inbox.popleft()
            try:
                work()
            except Exception:  # of one request or one job, which has its error already or will time out
                log.exception("message_failed")
        if changed:
            self.engine.observe()

    @property
    def has_messages(self) -> bool:
        """True if the inbox is not empty: background work should end soon. From any thread."""
        return bool(self._inbox)

    @property
    def _has_work(self) -> bool:
        return self.engine.busy or self.engine.lost or (self.background is not None and self.background.ready)

    def _submit(self, submissions: Sequence[Submission]) -> None:
        failure: RequestError
        try:
            self.engine.submit_all(submissions)
        except RequestError as error:
            failure = error
        except Exception:
            log.exception("submission_failed", request_id=submissions[0].request_id)
            failure = EngineFailure(ROW_FAILED)
        else:
            return
        self.on_event_loop(self._fail, [one.id for one in submissions], failure)

    def on_event_loop(self, work: Callable[..., None], *args: object) -> None:
        """Run `work` on the event loop, in the order of the calls. Called from the engine thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: no reader is left
            self._loop.call_soon_threadsafe(work, *args)

    def _bury(self) -> None:
        reason = "The engine has failed; the server is going down."
        self._fail(list(self._streams), EngineUnavailable(reason))
        self._refuse_calls(reason)
        self.died.set()
