"""The engine on its own thread, seen from the event loop.

The engine thread takes messages from an inbox, steps while there is work, and sleeps on a condition
when there is none. Outputs cross back with one `call_soon_threadsafe` a step. Model steps never run
on the event loop, and the scheduler is never touched from two threads.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.apart import call_apart, run_apart
from runtime.assembly import Assembled, assemble
from runtime.background import Background
from runtime.errors import Conflict, EngineUnavailable, RequestError, TooManyRequests
from runtime.gathering import Gathering
from runtime.logs import get_logger
from runtime.messages import Output, Submission
from runtime.stream import OutputStream
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.trainer.adapters.library import AdapterLibrary

T = TypeVar("T")

log = get_logger(__name__)


class EngineService:
    """Submissions in, output streams out. All methods but the thread's own belong to the event loop."""

    def __init__(self, settings: Settings, assembled: Assembled) -> None:
        self.settings = settings
        self.engine = assembled.engine
        self.tokenizer = assembled.engine.tokenizer
        self.metrics = assembled.engine.metrics
        self.model_name = assembled.model_name
        self.max_model_len = assembled.engine.max_len
        self.block_size = assembled.block_size
        self.num_blocks = assembled.num_blocks
        self.lora_base = assembled.lora_base
        self.decoder = assembled.decoder
        self.make_run = assembled.make_run
        self.adapters: AdapterLibrary | None = None
        """The adapters that can be asked for by name; set by who opens the state directory, if anybody does."""
        self.created = int(time.time())
        self.died = asyncio.Event()
        """Set when the engine thread ended by itself: nothing can be served any more."""
        self._drained = asyncio.Event()
        """Set whenever the last stream is gone."""
        self._streams: dict[str, OutputStream] = {}
        self._adapter_of: dict[str, str] = {}
        """Request id → adapter key, for the streams that are not for the base."""
        self._adapter_streams: Counter[str] = Counter()
        self._calls: set[asyncio.Future[Any]] = set()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self._step_started: float | None = None
        self._gathering = Gathering()
        self.background: Background | None = None
        """What the engine thread does beside steps, and when there are none."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def load(cls, settings: Settings) -> "EngineService":
        """Read the weights and build everything; blocks for seconds. Raises `ModelLoadError`."""
        return cls(settings, run_apart(assemble, settings))

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread. Called in the running event loop that will receive the outputs."""
        self._loop = asyncio.get_running_loop()
        self.engine.on_loss(lambda: self.on_engine_thread(lambda: None))
        self._thread.start()

    def drain(self) -> None:
        """Refuse new requests from now on; the running ones and training go on."""
        self._draining = True

    async def stop(self, drain_timeout: float) -> None:
        """Refuse new requests, give the running ones `drain_timeout` seconds, abort the rest, end the thread."""
        self.drain()
        if self._streams:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_timeout)
        for stream in list(self._streams.values()):
            self.abort(stream.request_id)
            stream.fail(EngineUnavailable("The server is shutting down."))
        self._stopping = True
        self.on_engine_thread(lambda: None)
        if self.engine.lost:
            await asyncio.to_thread(self.engine.close)  # new workers would be waited for
        if self._thread.ident is not None:
            # A step that hangs must not keep the process: the thread is a daemon.
            await asyncio.to_thread(self._thread.join, self.settings.server.drain_timeout)
        await asyncio.to_thread(self.engine.close)

    @property
    def healthy(self) -> bool:
        """False when the thread is dead, or a step takes longer than `server.step_timeout`."""
        started = self._step_started
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
        """Hand a sequence to the engine. Raises `InvalidRequest` and its kin for what can never run,
        `TooManyRequests`, `Conflict` for an id in use, `EngineUnavailable` when draining or dead."""
        if self._draining or not self._thread.is_alive():
            raise EngineUnavailable("The server is shutting down." if self._draining else "The engine is not running.")
        self._require_workers()
        request_id = submission.request_id
        if request_id in self._streams:
            raise Conflict(f"A request with id {request_id!r} is already running.", param="request_id")
        submission = self.engine.prepare(submission)
        try:
            self.engine.scheduler.check_room(len(submission.prompt_ids), num_requests=len(self._streams))
        except TooManyRequests:
            self.metrics.on_rejection("queue_full")
            raise
        stream = self._streams[request_id] = OutputStream(request_id, self.abort)
        if submission.adapter:
            self._adapter_of[request_id] = submission.adapter
            self._adapter_streams[submission.adapter] += 1
        self.on_engine_thread(lambda: self._submit(submission, stream))
        return stream

    def abort(self, request_id: str) -> None:
        """Take a request out of the engine before its next step. Unknown and finished ids are fine."""
        if self._forget(request_id):
            self.on_engine_thread(lambda: self.engine.abort(request_id))

    async def reset_prefixes(self) -> int:
        """Forget all cached prefixes. Returns how many blocks could have been found. Raises `EngineUnavailable`."""
        return await self.call(self.engine.scheduler.blocks.reset_prefixes)

    # -- adapters ------------------------------------------------------------------------------

    async def load_adapter(self, key: str, directory: str) -> None:
        """Read an adapter version's files beside the engine, then let requests name it.
        Raises `AdapterInvalid`, `EngineUnavailable`."""
        self._require_workers()
        await call_apart(self.engine.prepare_adapter, key, directory)
        await self.call(lambda: self.engine.load_adapter(key))

    async def unload_adapter(self, key: str) -> None:
        """Refuse new requests for a version. Its memory is free once the last one for it has ended."""
        await self.call(lambda: self.engine.unload_adapter(key))

    def adapter_in_use(self, key: str) -> bool:
        """Is a request for this version not answered yet?"""
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
            if future.done():  # whoever asked has left
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
        """Do `work` on the engine thread before its next step. From any thread; wakes it."""
        with self._wake:
            self._inbox.append(work)
            self._wake.notify()

    def _require_workers(self) -> None:
        if self.engine.lost:
            raise EngineUnavailable(
                "A process that computes the model was lost; the model is being loaded again. Try again in a moment."
            )

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                if output.finish_reason is not None:
                    self._forget(output.request_id)
                stream.put(output)

    def _forget(self, request_id: str) -> bool:
        """Drop a stream; False when it was gone already."""
        known = self._streams.pop(request_id, None) is not None
        if (key := self._adapter_of.pop(request_id, None)) is not None:
            self._adapter_streams[key] -= 1
            if not self._adapter_streams[key]:
                del self._adapter_streams[key]
        if not self._streams:
            self._drained.set()
        return known

    def _fail(self, stream: OutputStream, error: RequestError) -> None:
        if self._streams.get(stream.request_id) is stream:
            self._forget(stream.request_id)
        stream.fail(error)

    # -- the engine thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                if self.engine.lost:
                    self._recover()
                elif self.engine.busy:
                    if not self._gather():
                        self._step()
                elif self.background is not None:
                    self.background.idle()
            self.engine.settle()
        except Exception:
            log.exception("engine_died")
            self.on_event_loop(self._bury)

    def _recover(self) -> None:
        self.on_event_loop(self._dispatch, self.engine.fail_running())
        self.engine.recover()

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
            with self._wake:
                if not self._inbox and not self._stopping:
                    self._wake.wait(seconds)
        return seconds > 0

    def _step(self) -> None:
        background = self.background if self.background is not None and self.background.ready else None
        prefilling = background is not None and self.engine.first_tokens_due
        self._step_started = began = time.monotonic()
        outputs = self.engine.step(ahead=background is None)
        self._step_started = None
        self.on_event_loop(self._dispatch, outputs)
        if background is not None and self.engine.busy:
            background.between_steps(
                time.monotonic() - began, decoding=not prefilling, first_tokens_due=self.engine.first_tokens_due
            )

    def _take_messages(self) -> None:
        """Do what the inbox says; wait for a message when there is nothing else to do."""
        with self._wake:
            while not self._inbox and not self._has_work and not self._stopping:
                self._wake.wait()
        changed = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()()
        if changed:
            self.engine.observe()

    @property
    def _has_work(self) -> bool:
        return self.engine.busy or self.engine.lost or (self.background is not None and self.background.ready)

    def _submit(self, submission: Submission, stream: OutputStream) -> None:
        try:
            self.engine.submit(submission)
        except RequestError as error:
            self.on_event_loop(self._fail, stream, error)

    def on_event_loop(self, work: Callable[..., None], *args: object) -> None:
        """Do `work` on the event loop, in the order of the calls. From the engine thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(work, *args)

    def _bury(self) -> None:
        for stream in list(self._streams.values()):
            self._fail(stream, EngineUnavailable("The engine has failed; the server is going down."))
        for call in list(self._calls):
            if not call.done():
                call.set_exception(EngineUnavailable("The engine has failed; the server is going down."))
        self.died.set()
