"""`eft batch`: a file of OpenAI batch lines through a server, or through a model loaded here."""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter

from runtime.cli import client
from runtime.cli.batch_files import Output, input_keys, read_input
from runtime.cli.batch_run import Runner, Tally
from runtime.cli.errors import CommandError, UsageError
from runtime.cli.flags import (
    MODEL_SECTIONS,
    Config,
    Json,
    read_settings,
    refuse_settings,
    with_settings,
)
from runtime.cli.progress import Meter


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
    config: Config = None,
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
    with Output(output) as results:
        run = _Run(input, results, keys, concurrency=concurrency, timeout=timeout)
        try:
            if not run.finished:  # nothing is loaded for nothing
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
    """One run: what is left of the input, and what came of it."""

    def __init__(
        self, source: Path, results: Output, keys: set[str | int], *, concurrency: int, timeout: float
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
        """Whether earlier runs did it all."""
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
        """What this run did; what earlier runs did is only counted."""
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
