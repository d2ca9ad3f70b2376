"""The sequences of one API request: started together, read together, ended together."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

from runtime.api.disconnect import cancel
from runtime.api.openai.responses import PromptTokensDetails, Usage
from runtime.api.record import RequestRecord
from runtime.errors import DeadlineExceeded, EngineUnavailable
from runtime.messages import Output, Submission

if TYPE_CHECKING:
    from runtime.service import EngineService
    from runtime.stream import OutputStream


class Generation:
    """`choices` sequences for each prompt, in the order prompt by prompt, of which the `best` are kept.
    `close` must be called."""

    def __init__(
        self,
        service: "EngineService",
        submissions: Iterable[Submission],
        *,
        choices: int,
        best: int,
        record: RequestRecord,
    ) -> None:
        """Submits all or none. Raises what `EngineService.submit` raises."""
        self.created = int(time.time())
        self._metrics = service.metrics
        self._record = record
        self._choices = choices
        self._best = best
        self._closed = False
        self._streams: list[OutputStream] = []
        try:
            for submission in submissions:
                self._streams.append(service.submit(submission))
        except BaseException:
            self._cancel()
            raise
        self._latest: list[Output | None] = [None] * len(self._streams)

    def close(self) -> None:
        """Abort what still runs, and count the request. Any number of times."""
        if self._closed:
            return
        self._closed = True
        self._cancel()
        each = [choice for output in self._latest if output for choice in output.choices or [output]]
        longest = max((output.generated_tokens for output in each), default=0)
        self._metrics.on_request(choices=self._best, longest=longest)
        usage = self.usage
        self._record.log.update(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Each sequence's deltas with its index, as they come. Raises what ends a request early."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield 0, self._note(0, output)
            return
        waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(self._streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
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
        parts = [self._note(index, output) async for output in self._streams[index]]
        last = parts[-1]
        return Output(
            request_id=last.request_id,
            text="".join(part.text for part in parts),
            token_ids=[id for part in parts for id in part.token_ids],
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            cumulative_logprob=last.cumulative_logprob,
            choices=last.choices,
        )

    def _note(self, index: int, output: Output) -> Output:
        if output.finish_reason == "timeout":
            raise DeadlineExceeded("The request was not done within its deadline_ms.", param="deadline_ms")
        if output.finish_reason in ("abort", "error"):
            raise EngineUnavailable(output.error or "The request was aborted before it was complete.")
        self._latest[index] = output
        return output

    @property
    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many choices share it."""
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


def _unlikeliness(output: Output) -> float:
    return -output.cumulative_logprob
