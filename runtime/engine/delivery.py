"""Conversion of a step's new tokens to client output (text, ends, and their metrics), and the queue to its reader."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from msgspec.structs import replace

from runtime.engine.hooks import Hooks
from runtime.errors import AdapterUnavailable, EngineFailure, GrammarTooComplex, RequestError
from runtime.messages import ADAPTER_UNLOADED, ADAPTER_UNREADABLE, GRAMMAR_TOO_COMPLEX, FinishReason, Output
from runtime.metrics import Metrics
from runtime.scheduler import INTERNAL_ERROR, Committed, Request, Scheduler
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer

Ending = tuple[FinishReason, str | int | None]
"""Finish reason of a sequence, and the stop string or id that caused it."""


class Delivery:
    """Keeps the text of every request from its submission to its end."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer_of: Callable[[str], Tokenizer],
        metrics: Metrics,
        hooks: Hooks,
        *,
        on_end: Callable[[Request], None],
    ) -> None:
        """`tokenizer_of` gives the tokenizer of an adapter version, or of the base (an empty key); `on_end` is called
        once for every request that has begun."""
        self._scheduler = scheduler
        self._tokenizer_of = tokenizer_of
        self._metrics = metrics
        self._hooks = hooks
        self._on_end = on_end
        self._texts: dict[int, Detokenizer] = {}

    def __len__(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._texts)

    def begin(self, request: Request) -> None:
        self._texts[request.id] = self._detokenizer(request)

    def text_of(self, request: Request, tokens: list[int]) -> str:
        """Text of one whole output of a request that has several."""
        text = self._detokenizer(request)
        return "".join(map(text.add, tokens)) + text.flush()

    def deliver(self, item: Committed) -> Output:
        """New tokens as text; ends the request if one of them ends it."""
        request = item.request
        if item.pooled is not None:
            error = self.finish(request, "stop")
            return self._output(request, error=error, pooled=item.pooled)
        if not item.tokens:
            return self._output(request, error=self.forget(request) or item.error)
        prompt_logprobs = request.prompt_logprobs if request.num_generated == len(item.tokens) else []
        tokens, text, ending = self._read(request, item.tokens)
        logprobs = item.logprobs[: len(tokens)]
        request.cumulative_logprob += sum(one.logprob for one in logprobs)
        error = self.note_tokens(request, len(tokens))
        if error is not None:
            self.finish(request, "error")
        elif ending is not None:
            error = self.finish(request, *ending)
        output = self._output(request, tokens, text, error)
        if request.params.logprobs is None and not prompt_logprobs:
            return output
        logprobs = [] if request.params.logprobs is None else logprobs
        return replace(output, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def fail(self, item: Committed) -> Output:
        """End a request for which `deliver` has raised."""
        request = item.request
        self._scheduler.finish(request, "error")
        if request.id in self._texts:
            self.forget(request)
        request.fail()
        return self._output(request, error=INTERNAL_ERROR)

    def withdraw(self, request: Request) -> None:
        """Drop a request that has begun, but was not queued after all."""
        self._texts.pop(request.id, None)

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> str | None:
        """End a request in any state. Returns the error message of a hook that raised, else None."""
        self._scheduler.finish(request, reason, stop_reason=stop_reason)
        return self.forget(request)

    def note_tokens(self, request: Request, count: int) -> str | None:
        """Take in new tokens. Returns the error message of a hook that raised, else None."""
        timing = request.timing
        first = timing.first_token is None
        self._metrics.on_tokens(timing, count, now := time.monotonic())
        timing.first_token = timing.first_token or now
        timing.last_token = now
        return self._hooks.first_token(request.submission, timing) if first else None

    def forget(self, request: Request) -> str | None:
        """Take in the end of a request. Returns the error message of a hook that raised, else None."""
        self._texts.pop(request.id, None)
        try:
            error = self._hooks.finish(request.submission, request.timing)
            if error is not None:
                request.fail()
            self._metrics.on_finish(request.timing)
        finally:
            self._on_end(request)
        return error

    def _detokenizer(self, request: Request) -> Detokenizer:
        params = request.params
        return Detokenizer(
            self._tokenizer_of(request.submission.adapter),
            request.submission.prompt_ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _read(self, request: Request, tokens: list[int]) -> tuple[list[int], str, Ending | None]:
        """Returns the tokens up to the one that ends the sequence, their visible text, and that end. Takes back tokens
        sampled beyond it."""
        text, params, shown = self._texts[request.id], request.params, ""
        for count, token in enumerate(tokens, 1):
            beyond = len(tokens) - count
            may_stop = request.num_generated - beyond >= params.min_tokens
            ending: Ending | None = None
            # Before min_tokens a grammar has come to its end where one of these was sampled.
            if token in request.stop_ids and (may_stop or request.submission.grammar):
                ending = "stop", token if token in params.stop_token_ids else None
                if params.include_stop_str_in_output:
                    shown += text.add(token, may_stop=False)
                shown += text.flush()
            else:
                shown += text.add(token, may_stop=may_stop)
                if text.stopped_by is not None:
                    ending = "stop", text.stopped_by
                elif len(request.tokens) - beyond >= request.max_len:
                    ending = "length", None
                    shown += text.flush()
            if ending is not None:
                request.cut(beyond)
                return tokens[:count], shown, ending
        return tokens, shown, None

    def _output(
        self,
        request: Request,
        token_ids: list[int] | None = None,
        text: str = "",
        error: str | None = None,
        pooled: list[float] | None = None,
    ) -> Output:
        return Output(
            id=request.id,
            request_id=request.submission.request_id,
            text=text,
            token_ids=token_ids or [],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            prompt_tokens=request.prompt_len,
            cached_tokens=request.timing.cached_tokens,
            generated_tokens=request.num_generated,
            cumulative_logprob=request.cumulative_logprob,
            pooled=pooled or [],
            error=error,
            timing=request.timing if request.finish_reason is not None else None,
        )


# -- streams ---------------------------------------------------------------------------------------
#
# The bounded queue between the engine and one client. Belongs to the event loop's thread.


CAPACITY = 16
"""Outputs that may wait for a reader; beyond that the newest ones are merged, so nothing is lost and a
stalled reader holds one output's worth of text."""


class OutputStream:
    """Async iterator over one request's outputs. Leave it with `async with`, and the request is aborted
    unless it is finished."""

    def __init__(self, id: int, abort: Callable[[int], None]) -> None:
        """`id` of the sequence's submission."""
        self.id = id
        self._abort = abort
        self._queue: deque[Output] = deque()
        self._ready = asyncio.Event()
        self._closed = False
        self._exhausted = False
        self._failure: RequestError | None = None

    def put(self, output: Output) -> None:
        """Called by the service for every output; the last one has a finish reason."""
        if self._closed:
            return
        if len(self._queue) >= CAPACITY:
            output = self._queue.pop().merge(output)
        self._queue.append(output)
        self._closed = output.finish_reason is not None
        self._ready.set()

    def fail(self, error: RequestError) -> None:
        """End the stream with an error, raised to the reader after the outputs that are queued already."""
        self._failure = error
        self.put(Output(id=self.id, finish_reason="error"))

    def cancel(self) -> None:
        """Abort the request unless it is finished already; a reader that still waits gets an end."""
        if not self._closed:
            self._abort(self.id)
            self.put(Output(id=self.id, finish_reason="abort"))

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> Output:
        """The next delta. Raises `EngineFailure`, `GrammarTooComplex`, `AdapterUnavailable`, or what `fail` was given,
        for a request that failed."""
        if self._exhausted:
            raise StopAsyncIteration
        while not self._queue:
            self._ready.clear()
            await self._ready.wait()
        output = self._queue.popleft()
        self._exhausted = output.finish_reason is not None
        if output.finish_reason == "error":
            raise self._failure or _failure(output.error)
        return output

    async def __aenter__(self) -> "OutputStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _failure(error: str | None) -> RequestError:
    """The failure of a request by its `Output.error`."""
    if error == GRAMMAR_TOO_COMPLEX:
        return GrammarTooComplex(error)
    if error in (ADAPTER_UNLOADED, ADAPTER_UNREADABLE):
        return AdapterUnavailable(error)
    return EngineFailure(error or "The engine failed.")
