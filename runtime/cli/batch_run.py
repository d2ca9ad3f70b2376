"""Sends the requests of a batch, some at a time, and makes a result of each answer."""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from runtime.cli.batch_files import BadLine, Job
from runtime.cli.client import describe, error_text
from runtime.cli.errors import CommandError

ATTEMPTS = 6
"""Tries of a request that the server has no room for, or that the connection failed for."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""
_BUSY = (429, 503)


class Tally(Struct):
    """What came of a run."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Runner:
    """Sends jobs through one client. `write` gets each result line as soon as it is there."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        write: Callable[[dict[str, Any]], None],
        *,
        default_model: str,
        timeout: float,
    ) -> None:
        """`default_model` is for bodies that name none; `timeout` (seconds) for one answer."""
        self._client = client
        self._write = write
        self._model = default_model
        self._timeout = timeout
        self.tally = Tally()

    async def run(self, items: Iterable[Job | BadLine], concurrency: int, on_result: Callable[[Tally], None]) -> None:
        """Work through `items`, `concurrency` at a time. Raises `CommandError` where the server is gone.

        A request that no answer came for is not written, so that a later run sends it again.
        """
        pending = iter(items)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(pending, on_result))
        except ExceptionGroup as failures:  # the others are of the same cause: no server, no disk
            raise failures.exceptions[0] from failures

    async def _work(self, pending: Iterator[Job | BadLine], on_result: Callable[[Tally], None]) -> None:
        for item in pending:  # one iterator for all workers: each takes the next
            if isinstance(item, BadLine):
                self._write(_bad_line(item))
                self.tally.failed += 1
            else:
                self._write(await self._result(item))
            on_result(self.tally)

    async def _result(self, job: Job) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._send(job)
        except TimeoutError:
            self.tally.failed += 1
            return _line(job.custom_id, error=_error("timeout", f"no answer within {self._timeout:g} s"))
        try:
            body = msgspec.json.decode(response.content)
        except msgspec.DecodeError:
            self.tally.failed += 1
            return _line(job.custom_id, error=_error("invalid_response", error_text(response)))
        self._count(response.status_code, body)
        request_id = response.headers.get("x-request-id", "")
        return _line(
            job.custom_id,
            response={"status_code": response.status_code, "request_id": request_id, "body": body},
        )

    async def _send(self, job: Job) -> httpx.Response:
        """The answer, after as many tries as it takes. Raises `CommandError` where the server is gone."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                response = await self._client.post(job.path, json={"model": self._model, **job.body})
            except httpx.TransportError as error:
                if last:
                    raise CommandError(f"the server is gone: {describe(error)}") from error
                await asyncio.sleep(_pause(attempt))
                continue
            if response.status_code not in _BUSY:
                return response
            if last:
                raise CommandError(f"the server cannot take it: {error_text(response)}")
            await asyncio.sleep(_pause(attempt, response.headers.get("retry-after")))
        raise AssertionError("the last attempt returns or raises")

    def _count(self, status: int, body: Any) -> None:
        if status != 200:
            self.tally.failed += 1
            return
        self.tally.ok += 1
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            self.tally.prompt_tokens += usage.get("prompt_tokens") or 0
            self.tally.output_tokens += usage.get("completion_tokens") or 0


def _pause(attempt: int, retry_after: str | None = None) -> float:
    """Seconds until the next try: what the server asks for, else twice as long each time."""
    wanted = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else 0.0
    return min(max(wanted, 0.25 * float(2**attempt)), LONGEST_WAIT)


def _bad_line(item: BadLine) -> dict[str, Any]:
    error = _error("invalid_line", f"line {item.line}: {item.reason}")
    return _line(item.custom_id, error={**error, "line": item.line})


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}


def _line(
    custom_id: str | None, *, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
