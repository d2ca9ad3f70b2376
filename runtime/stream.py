"""The bounded queue between the engine and one client. Belongs to the event loop's thread."""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from runtime.errors import EngineFailure, RequestError
from runtime.messages import Output

CAPACITY = 16
"""Outputs that may wait for a reader; beyond that the newest ones are merged, so nothing is lost and a
stalled reader holds one output's worth of text."""


class OutputStream:
    """Async iterator over one request's outputs. Leave it with `async with`, and the request is aborted
    unless it is finished."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
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
        self.put(Output(request_id=self.request_id, finish_reason="error"))

    def cancel(self) -> None:
        """Abort the request unless it is finished already; whoever still reads gets an end."""
        if not self._closed:
            self._abort(self.request_id)
            self.put(Output(request_id=self.request_id, finish_reason="abort"))

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> Output:
        """The next delta. Raises `EngineFailure`, or what `fail` was given, for a request that failed."""
        if self._exhausted:
            raise StopAsyncIteration
        while not self._queue:
            self._ready.clear()
            await self._ready.wait()
        output = self._queue.popleft()
        self._exhausted = output.finish_reason is not None
        if output.finish_reason == "error":
            raise self._failure or EngineFailure(output.error or "The engine failed.")
        return output

    async def __aenter__(self) -> "OutputStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
