"""The sequences of one API request: started together, read together, ended together. What is submitted was checked
before (`options.py`), and is trusted by the engine."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from litestar import Request, Response
from litestar.types import Receive
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from runtime.api.http.record import LOAD_FORMATS, PHASES, RequestRecord, make_id, record_of
from runtime.api.http.sse import EventStream, unless_disconnected, with_end
from runtime.api.openai.forms import PLAIN, AnswerForm
from runtime.api.openai.logprobs import LogprobWriter, count_logprobs, write_answer
from runtime.api.openai.models import Served
from runtime.api.openai.options import Wanted, beams_of, choice_of, choices_of, fit_context, sequences_of
from runtime.api.openai.prompts import PromptEncoder
from runtime.api.openai.responses import AnswerTimes, PromptTokensDetails, Usage
from runtime.api.openai.schema import GenerationRequest
from runtime.errors import AdapterUnavailable, Conflict, ContextLengthExceeded, DeadlineExceeded, EngineUnavailable
from runtime.messages import Output, Submission, TokenLogprob, new_sequence_id
from runtime.support.event_loop import cancel
from runtime.support.version import version
from runtime.text.tokenizer import Tokenizer
from settings.api import LimitSettings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

VERSION_HEADER = "x-eft-adapter-version"
"""Response header: the version that gives the answer."""
LOAD_FORMAT_HEADER = "endpoint-load-metrics-format"
"""Request header of load balancers: the form in which the answer is to report the server's load (ORCA)."""


def take_id(request: Request[Any, Any, Any], given: str | None, served: Served) -> RequestRecord:
    """The request's record, from here on with the version in the headers of every answer, errors included. An id in the
    body overrides the id of the record."""
    record = record_of(request)
    record.headers[VERSION_HEADER] = record.log["model"] = served.label
    if (form := request.headers.get(LOAD_FORMAT_HEADER)) is not None:
        record.load_format = form.strip().upper()
        if record.load_format not in LOAD_FORMATS:
            record.warnings.append(f"{LOAD_FORMAT_HEADER}: expected one of {', '.join(LOAD_FORMATS)}")
            record.load_format = ""
    if given is not None:
        record.request_id = make_id(given)
    return record


def encoder_for(request: GenerationRequest, served: Served, limits: LimitSettings, receive: Receive) -> PromptEncoder:
    """Encoder of the prompts of a request; `receive` returns a disconnect when its client has left."""
    truncated = request.truncate_prompt_tokens is not None
    return PromptEncoder(
        served.tokenizer,
        served.vocab_size,
        None if truncated else served.service.max_model_len,
        limits.max_tokenize_chars,
        receive,
        apart=served.own_tokenizer is not None,
    )


def logprob_writer(request: GenerationRequest, tokenizer: Tokenizer) -> LogprobWriter:
    """Writer of a request's log-probabilities."""
    return LogprobWriter(
        tokenizer,
        as_ids=bool(request.return_tokens_as_token_ids),
        skip_special_tokens=request.skip_special_tokens,
    )


@lru_cache(8)
def fingerprint(model_name: str, dtype: str) -> str:
    """OpenAI's `system_fingerprint`: changes when the same request may give other tokens."""
    return "fp_" + hashlib.blake2b(f"{version()}\0{model_name}\0{dtype}".encode(), digest_size=5).hexdigest()


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


# -- start -----------------------------------------------------------------------------------------


def start(
    served: Served,
    request: GenerationRequest,
    wanted: Wanted,
    prompts: list[list[int]],
    record: RequestRecord,
    *,
    prompt_field: str,
    form: AnswerForm = PLAIN,
) -> Generation:
    """Submit `n` sequences for each prompt, or `best_of`. `served` is ready, and nothing was awaited since.
    Raises a `RequestError` that names the field at fault."""
    service = served.service
    if prompt_field == "messages" and (format := served.prompt_format) not in (None, "chat"):
        record.warnings.append(f"{served.label} was trained on texts ({format}), not on chats: ask in /v1/completions")
    _warn_of_limit(wanted, record)
    try:
        submissions = list(_submissions(request, wanted, prompts, record, served, prompt_field, form))
        _reserve(record, submissions, request, service.num_running)
        return Generation(
            service,
            submissions,
            choices=sequences_of(request),
            best=choices_of(request),
            record=record,
            scores_only=wanted.scores_only,
        )
    except (
        ContextLengthExceeded,
        Conflict,
        EngineUnavailable,
        AdapterUnavailable,
    ) as error:  # the engine counts a full queue itself
        service.metrics.on_rejection(error.code or "")
        raise


def _warn_of_limit(wanted: Wanted, record: RequestRecord) -> None:
    asked = wanted.params.max_tokens
    if asked is not None and wanted.limit is not None and asked > wanted.limit:
        record.warnings.append(f"{wanted.max_field} is {wanted.limit}, the most that this server generates")


def _submissions(
    request: GenerationRequest,
    wanted: Wanted,
    prompts: list[list[int]],
    record: RequestRecord,
    served: Served,
    prompt_field: str,
    form: AnswerForm,
) -> Iterator[Submission]:
    """All sequences of one prompt, then of the next. The first one computes the prompt for the others."""
    count = sequences_of(request)
    beams = beams_of(request, choices_of(request))
    arrival = time.monotonic()
    deadline = None if request.deadline_ms is None else arrival + request.deadline_ms / 1000
    chat = prompt_field == "messages"
    ends = () if request.ignore_eos else served.end_ids if chat else served.text_end_ids
    texts = served.stop_texts if chat and not request.ignore_eos and beams is None else ()
    for prompt in prompts:
        fitted = fit_context(wanted, len(prompt), served.service.max_model_len, prompt_field=prompt_field)
        if ends or texts:
            given = fitted.stop_strings
            fitted = replace(fitted, stop_token_ids=(*fitted.stop_token_ids, *ends), stop=(*given, *texts))
        if form.shows_special:
            fitted = replace(fitted, skip_special_tokens=False)
        first = new_sequence_id()
        for choice in range(count):
            yield Submission(
                id=new_sequence_id() if choice else first,
                request_id=record.request_id,
                prompt_ids=prompt,
                params=choice_of(fitted, choice),
                adapter=served.key,
                cache_salt=_salt(record, request.cache_salt or ""),
                priority=request.priority or 0,
                deadline=deadline,
                tenant=record.tenant,
                fork_of=first if choice else 0,
                scored=count > choices_of(request),
                beams=beams,
                background=record.background,
                arrival=arrival,
                grammar=form.grammar,
            )


def _salt(record: RequestRecord, asked: str) -> str:
    """Salt that separates cached prefixes: the key's label, if keys are configured, and the client's own salt."""
    return f"{record.salt}\0{asked}" if record.salt else asked


def _reserve(record: RequestRecord, submissions: list[Submission], request: GenerationRequest, running: int) -> None:
    """Reserve the most that the request may use from its key's limits. Raises `RateLimited`, `InvalidRequest`."""
    if record.quota is None:
        return
    firsts = [submission for submission in submissions if not submission.fork_of]
    asked = request.max_tokens or getattr(request, "max_completion_tokens", None)
    width = submissions[0].beams.width if submissions[0].beams else 1
    record.quota.reserve(
        sequences=len(submissions) * width,
        prompt_tokens=sum(len(submission.prompt_ids) for submission in firsts),
        max_tokens=sum(submission.params.max_tokens or 0 for submission in submissions) * width if asked else 0,
        num_running=running,
        priority=request.priority or 0,
        deadline=None if request.deadline_ms is None else request.deadline_ms / 1000,
    )
