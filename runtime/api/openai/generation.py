"""The sequences of one API request: started together, read together, ended together."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from litestar import Response
from litestar.types import Receive
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from runtime.api.http.record import PHASES, RequestRecord
from runtime.api.http.sse import EventStream, unless_disconnected, with_end
from runtime.api.openai.logprobs import count_logprobs, write_answer
from runtime.api.openai.responses import AnswerTimes, PromptTokensDetails, Usage
from runtime.errors import DeadlineExceeded, EngineUnavailable
from runtime.messages import Output, Submission, TokenLogprob
from runtime.support.event_loop import cancel

if TYPE_CHECKING:
    from runtime.engine.service import EngineService


class Generation:
    """`choices` sequences for each prompt, in the order prompt by prompt, of which the `best` are kept.
    `close` must be called."""

    def __init__(
        self,
        service: "EngineService",
        submissions: Sequence[Submission],
        *,
        choices: int,
        best: int,
        record: RequestRecord,
        scores_only: bool = False,
    ) -> None:
        """Submit all sequences or none. `scores_only`: what is generated is left out of the answer. Raises the errors
        of `EngineService.submit_all`."""
        self.prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        """Prompt by number → the log-probabilities of its tokens after the first, once they are there."""
        self._scores_only = scores_only
        self.created = int(time.time())
        self._metrics = service.metrics
        self._record = record
        self._choices = choices
        self._best = best
        self._closed = False
        self._streams = service.submit_all(submissions)
        self._latest: list[Output | None] = [None] * len(self._streams)
        self._parts: list[list[Output]] | None = None
        """Outputs of each sequence, where a stream's answer is wanted whole at its end."""

    def close(self) -> None:
        """Abort running sequences, and count the request. May be called several times."""
        if self._closed:
            return
        self._closed = True
        self._cancel()
        each = [choice for output in self._latest if output for choice in output.choices or [output]]
        longest = max((output.generated_tokens for output in each), default=0)
        self._metrics.on_request(choices=self._best, longest=longest)
        usage = self.usage
        if self._record.quota is not None:
            self._record.quota.settle(usage.total_tokens)
        self._record.log.update(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
            **_phases(self._latest[0], self._record.started),
        )

    def usage_before(self, output: Output) -> Usage:
        """The usage without the tokens of the last output."""
        usage = self.usage
        count = len(output.token_ids)
        return replace(
            usage, completion_tokens=usage.completion_tokens - count, total_tokens=usage.total_tokens - count
        )

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Each sequence's deltas with its index, as they arrive. Raises the error that ends a request early."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield 0, self._note(0, output)
            return
        waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(self._streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):  # the first choice has the prompt's scores
                    index = waiting.pop(task)
                    output = self._note(index, task.result())
                    if output.finish_reason is None:
                        waiting[asyncio.ensure_future(anext(self._streams[index]))] = index
                    yield index, output
        finally:
            await cancel(*waiting)

    async def collect(self) -> list[Output]:
        """Each prompt's best outputs, whole: those of the highest log-probability, likeliest first."""
        outputs = await asyncio.gather(*map(self._collect, range(len(self._streams))))
        if found := [choice for output in outputs for choice in output.choices]:
            return found  # by beam searches, which have ranked theirs
        if self._best == self._choices:
            return list(outputs)
        groups = (outputs[start : start + self._choices] for start in range(0, len(outputs), self._choices))
        return [output for group in groups for output in sorted(group, key=_unlikeliness)[: self._best]]

    async def _collect(self, index: int) -> Output:
        return _joined([self._note(index, output) async for output in self._streams[index]])

    def keep_parts(self) -> None:
        """Keep what `outputs` gives, for `streamed`."""
        self._parts = [[] for _ in self._streams]

    def streamed(self) -> list[Output]:
        """Each sequence's output, whole, once `outputs` has ended."""
        assert self._parts is not None, "keep_parts was called"
        return list(map(_joined, self._parts))

    def _note(self, index: int, output: Output) -> Output:
        if output.finish_reason == "timeout":
            raise DeadlineExceeded("The request was not done within its deadline_ms.", param="deadline_ms")
        if output.finish_reason in ("abort", "error"):
            raise EngineUnavailable(output.error or "The request was aborted before it was complete.")
        if output.prompt_logprobs:
            self.prompt_logprobs[index // self._choices] = output.prompt_logprobs
        if self._scores_only:
            end = output.finish_reason and "length"
            output = Output(
                id=output.id, prompt_tokens=output.prompt_tokens, cached_tokens=output.cached_tokens, finish_reason=end
            )
        if self._latest[index] is None and self._record.quota is not None:
            self._record.quota.started()
        self._latest[index] = output
        if self._parts is not None:
            self._parts[index].append(output)
        return output

    @property
    def times(self) -> AnswerTimes | UnsetType:
        """Times of the first sequence once it has ended; else UNSET."""
        return _times(self._latest[0])

    @property
    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once for all its choices."""
        seen = [output for output in self._latest if output is not None]
        firsts = [output for output in self._latest[:: self._choices] if output is not None]
        prompt = sum(output.prompt_tokens for output in firsts)
        completion = sum(output.generated_tokens for output in seen)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(sum(output.cached_tokens for output in firsts)),
        )


def _times(output: Output | None) -> AnswerTimes | UnsetType:
    """Times of a finished sequence; UNSET where they are not known."""
    timing = output.timing if output is not None else None
    if output is None or timing is None:
        return UNSET
    first, last, scheduled, count = timing.first_token, timing.last_token, timing.scheduled, output.generated_tokens
    whole = last - first if first is not None and last is not None else None
    return AnswerTimes(
        time_to_first_token_ms=_ms(None if first is None else first - timing.arrival),
        generation_time_ms=_ms(whole),
        queue_time_ms=_ms(None if scheduled is None else scheduled - timing.arrival),
        mean_itl_ms=_ms(whole / (count - 1) if whole and count > 1 else None),
        tokens_per_second=round(count / whole, 2) if whole else None,
    )


def _phases(output: Output | None, started: float) -> dict[str, float | None]:
    """Milliseconds of each phase of a sequence, by the name of its field in the log; `started`: time of the request.
    Empty for one that was left before its end."""
    timing = output.timing if output is not None else None
    if timing is None:
        return {}
    times = (started, timing.arrival, timing.scheduled, timing.first_token, timing.last_token)
    return {
        name: _ms(None if begin is None or end is None else max(0.0, end - begin))
        for name, (begin, end) in zip(PHASES, pairwise(times), strict=True)
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


class Renderer(Protocol):
    """An endpoint's form of an answer."""

    def whole(self, outputs: list[Output]) -> Struct: ...

    def chunks(self) -> AsyncGenerator[Struct, None]: ...


async def respond(
    generation: Generation,
    make: Callable[[], Renderer],
    record: RequestRecord,
    receive: Receive,
    *,
    stream: bool,
    keep: Callable[[Any], Awaitable[None]] | None = None,
) -> Response[Any]:
    """The response with the answer that `make` renders, streamed or whole. The generation is closed with it, however
    it ends. `keep`: awaited with the whole answer before it is complete for the client, streamed or not. Raises
    `ClientDisconnected`, and the errors that end a request early where it is not streamed."""

    async def write(outputs: list[Output]) -> Struct:
        count = count_logprobs(*generation.prompt_logprobs.values(), *(output.logprobs for output in outputs))
        whole: Struct = await write_answer(lambda: answer.whole(outputs), count)
        if keep is not None:
            await keep(whole)
        return whole

    async def kept_chunks() -> AsyncGenerator[Struct, None]:
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk
        await write(generation.streamed())

    with ExitStack() as stack:
        stack.callback(generation.close)
        answer = make()
        if stream:
            if keep is not None:
                generation.keep_parts()
            chunks = answer.chunks() if keep is None else kept_chunks()
            return EventStream(with_end(chunks, record), stack.pop_all().close)
        return Response(await write(await unless_disconnected(receive, generation.collect())))


def _joined(parts: Sequence[Output]) -> Output:
    """One sequence's output of all its deltas."""
    last = parts[-1]
    return Output(
        id=last.id,
        text="".join(part.text for part in parts),
        token_ids=[id for part in parts for id in part.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cumulative_logprob=last.cumulative_logprob,
        logprobs=[one for part in parts for one in part.logprobs],
        choices=last.choices,
        timing=last.timing,
    )


def _unlikeliness(output: Output) -> float:
    return -output.cumulative_logprob
