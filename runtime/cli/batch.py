"""`eft batch`: a file of OpenAI batch lines through a server, or through a model loaded here."""

import asyncio
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Self

import httpx
import msgspec
from cyclopts import Parameter
from msgspec import Struct

from runtime.cli import client
from runtime.cli.client import describe, error_text
from runtime.cli.flags import MODEL_SECTIONS, ConfigFile, Json, read_settings, refuse_settings, with_settings
from runtime.cli.output import CommandError, Meter, UsageError

# -- batch files -----------------------------------------------------------------------------------
#
# The two files of `eft batch`: requests in, one JSON object a line, and results out, appended.
#
# The output is also the record of finished requests. A line counts once it is complete; a torn last line, left by a
# crash, is cut off before more is appended.

PATHS = ("/v1/chat/completions", "/v1/completions")


class BatchJob(Struct, frozen=True):
    """One request of the input."""

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]

    @property
    def key(self) -> str | int:
        return self.custom_id


class BadLine(Struct, frozen=True):
    """A line of the input that is no request. `custom_id`: its own, if it has one."""

    line: int
    custom_id: str | None
    reason: str

    @property
    def key(self) -> str | int:
        """Key of its line in the output: the custom_id, or else the line number."""
        return self.line if self.custom_id is None else self.custom_id


def read_input(path: Path) -> Iterator[BatchJob | BadLine]:
    """The input's lines in order, without blank ones. Raises `UsageError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse(number, raw)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def input_keys(path: Path) -> set[str | int]:
    """The keys of all lines. Raises `UsageError` for a custom_id that occurs twice, and for a missing file."""
    first: dict[str | int, int] = {}
    for item in read_input(path):
        if item.key in first:
            raise UsageError(
                f"{path}: custom_id {item.key!r} of line {item.line} is also that of line {first[item.key]}"
            )
        first[item.key] = item.line
    return set(first)


def _parse(number: int, raw: bytes) -> BatchJob | BadLine:
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadLine(number, None, f"is no JSON: {error}")
    if not isinstance(line, dict):
        return BadLine(number, None, "is no JSON object")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, f"custom_id must be a non-empty string, got {custom_id!r:.80}")
    if reason := _fault(line):
        return BadLine(number, custom_id, reason)
    return BatchJob(number, custom_id, line["url"], line["body"])


def _fault(line: dict[str, Any]) -> str | None:
    if unknown := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        return f"has unknown keys: {', '.join(unknown)}"
    if line.get("method", "POST") != "POST":
        return f"method must be POST, got {line['method']!r:.80}"
    if line.get("url") not in PATHS:
        return f"url must be {' or '.join(PATHS)}, got {line.get('url')!r:.80}"
    if not isinstance(line.get("body"), dict):
        return "body must be an object"
    return "stream is not possible in a batch" if line["body"].get("stream") else None


class ResultFile:
    """The output file, open for appending and locked against a second run. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` if the file cannot be written, is in use, or holds something else."""
        self._path = path
        self.done: set[str | int] = set()
        """custom_ids of complete lines; the line number for an input line that had none."""
        self.failed = 0
        """Number of `done` lines that hold an error, or an answer other than 200."""
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            self._lock()
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another eft batch is writing {self._path}") from error
        except OSError as error:
            raise UsageError(f"cannot lock {self._path}: {error.strerror}") from error

    def _resume(self) -> None:
        self._file.seek(0)
        complete = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            self.done.add(self._key(number, raw))
            complete += len(raw)
        self._file.truncate(complete)

    def _key(self, number: int, raw: bytes) -> str | int:
        """Key of the request that a complete line finishes."""
        try:
            line = msgspec.json.decode(raw)
            custom_id, error = line["custom_id"], line["error"]
            self.failed += error is not None or line["response"]["status_code"] != 200
            return str(custom_id) if custom_id is not None else int(error["line"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self._path} exists, and its line {number} is no result of a batch: choose another output"
            ) from error


# -- batch run -------------------------------------------------------------------------------------
#
# Send the requests of a batch, some at a time, and turn each answer into a result.

ATTEMPTS = 6
"""Most tries of a request that the server has no room for, or whose connection failed."""
LONGEST_WAIT = 30.0
"""Most seconds between two tries."""
_BUSY = (429, 503)


class Tally(Struct):
    """Counts of a run."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Runner:
    """Sender of jobs through one client. `write` gets each result line as soon as it is ready."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        write: Callable[[dict[str, Any]], None],
        *,
        default_model: str,
        timeout: float,
    ) -> None:
        """`default_model`: for bodies that name none; `timeout`: seconds for one answer."""
        self._client = client
        self._write = write
        self._model = default_model
        self._timeout = timeout
        self.tally = Tally()

    async def run(
        self, items: Iterable[BatchJob | BadLine], concurrency: int, on_result: Callable[[Tally], None]
    ) -> None:
        """Work through `items`, `concurrency` at a time. Raises `CommandError` where the server is gone.

        A request without an answer is not written, so that a later run sends it again.
        """
        pending = iter(items)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(pending, on_result))
        except ExceptionGroup as failures:  # the others are of the same cause: no server, no disk
            raise failures.exceptions[0] from failures

    async def _work(self, pending: Iterator[BatchJob | BadLine], on_result: Callable[[Tally], None]) -> None:
        for item in pending:  # one iterator for all workers: each takes the next
            if isinstance(item, BadLine):
                self._write(_bad_line(item))
                self.tally.failed += 1
            else:
                self._write(await self._result(item))
            on_result(self.tally)

    async def _result(self, job: BatchJob) -> dict[str, Any]:
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

    async def _send(self, job: BatchJob) -> httpx.Response:
        """The answer, after at most `ATTEMPTS` tries. Raises `CommandError` where the server is gone."""
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
    """Seconds until the next try: the Retry-After of the server, else twice as long each time."""
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


@with_settings(*MODEL_SECTIONS)
def batch(
    input: Annotated[Path, Parameter(help="JSONL file of requests: custom_id, method, url, body.")],
    output: Annotated[Path, Parameter(help="JSONL file of results. What is in it is not done again.")],
    /,
    *,
    url: Annotated[str | None, Parameter(help="Server to use, instead of loading a model here.")] = None,
    api_key: Annotated[str | None, Parameter(help="Key for the server; default: EFT_API_KEY.")] = None,
    concurrency: Annotated[int, Parameter(help="Requests at once.")] = 32,
    timeout: Annotated[float, Parameter(help="Seconds that one answer may take.")] = 600.0,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Do what of `input` is not in `output` yet. Returns 1 where a request failed, in this run or before."""
    if concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1, got {concurrency}")
    if not timeout > 0:
        raise UsageError(f"--timeout must be above 0 seconds, got {timeout}")
    open_client: Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]
    if url is None:
        if api_key is not None:
            raise UsageError("--api-key is for a server; a model that is loaded here asks for none")
        open_client = partial(client.in_process, read_settings(flags, config))
    else:
        refuse_settings(flags, config)
        open_client = partial(client.remote, url, api_key)
    keys = input_keys(input)
    if output.exists() and output.samefile(input):
        raise UsageError("the output must not be the input")
    with ResultFile(output) as results:
        run = _Run(input, results, keys, concurrency=concurrency, timeout=timeout)
        try:
            if not run.finished:  # load no model for an empty run
                asyncio.run(run.go(open_client()))
        except KeyboardInterrupt:
            print("eft: stopped; the same command goes on from here", file=sys.stderr)
            raise
        except UsageError:
            raise
        except CommandError as error:
            raise CommandError(f"{error}; the same command goes on from here") from error
    run.report(json=json)
    return 1 if run.tally.failed or results.failed else 0


class _Run:
    """One run: the rest of the input, and its results."""

    def __init__(
        self, source: Path, results: ResultFile, keys: set[str | int], *, concurrency: int, timeout: float
    ) -> None:
        self._source = source
        self._results = results
        self._total = len(keys)
        self._skipped = len(keys & results.done)
        self._concurrency = concurrency
        self._timeout = timeout
        self._started = time.monotonic()
        self.tally = Tally()

    @property
    def finished(self) -> bool:
        """True if earlier runs did all of the input."""
        return self._skipped == self._total

    async def go(self, opened: AbstractAsyncContextManager[httpx.AsyncClient]) -> None:
        left = (item for item in read_input(self._source) if item.key not in self._results.done)
        async with opened as http:
            name = await client.served_model(http)
            runner = Runner(http, self._results.write, default_model=name, timeout=self._timeout)
            self.tally = runner.tally
            self._started = time.monotonic()
            with Meter("batch", self._total, done=self._skipped) as meter:
                await runner.run(left, self._concurrency, lambda tally: meter.advance(self._note(tally)))

    def _note(self, tally: Tally) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        note = f"{tally.output_tokens / seconds:.0f} tok/s"
        return f"{note}, {tally.failed} failed" if tally.failed else note

    def report(self, *, json: bool) -> None:
        """Print the results of this run; those of earlier runs are only counted."""
        tally, seconds = self.tally, time.monotonic() - self._started
        if json:
            before = {"skipped": self._skipped, "failed_before": self._results.failed}
            record = {**msgspec.structs.asdict(tally), **before, "seconds": round(seconds, 3)}
            print(msgspec.json.encode(record).decode())
            return
        before_text = f"; {self._skipped} done before" if self._skipped else ""
        before_text += f" ({self._results.failed} of them failed)" if self._results.failed else ""
        print(
            f"{tally.ok} succeeded, {tally.failed} failed{before_text}; "
            f"{tally.prompt_tokens} prompt and {tally.output_tokens} output tokens in {seconds:.1f} s"
        )
