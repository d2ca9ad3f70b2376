"""POST /v1/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property, partial
from typing import Any

from litestar import Response, post
from msgspec import UNSET, UnsetType

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.forms import PLAIN, check_form
from runtime.api.openai.generation import Generation, encoder_for, fingerprint, logprob_writer, respond, start, take_id
from runtime.api.openai.logprobs import (
    ChoiceLogprobs,
    CompletionLogprobs,
    LogprobWriter,
    PromptLogprobs,
    count_logprobs,
    write_answer,
)
from runtime.api.openai.models import resolve_model
from runtime.api.openai.neutral import COMPLETION_NEUTRAL
from runtime.api.openai.options import DEFAULT_COMPLETION_TOKENS, check, choices_of, truncate
from runtime.api.openai.prompts import PromptEncoder, count_prompts
from runtime.api.openai.responses import AnswerTimes, CompletionChoice, TextCompletion
from runtime.api.openai.schema import CompletionRequest, Intake
from runtime.errors import InvalidRequest, Unsupported
from runtime.messages import Output, TokenLogprob
from runtime.text.tokenizer import InfillTokens, Tokenizer

_intake = Intake(CompletionRequest, neutral=COMPLETION_NEUTRAL)


@post("/v1/completions", status_code=200, opt={BODY: CompletionRequest})
async def create_completion(request: AnyRequest) -> Response[TextCompletion]:
    """Continue one text or many, whole or streamed."""
    api = api_of(request)
    service = api.handle.require()
    asked, given = await _intake.read_given(request, api)
    served = await resolve_model(service, asked.model)
    record = take_id(request, asked.request_id, served)
    limits, context = api.settings.limits, service.max_model_len
    if (count := count_prompts(asked.prompt)) > limits.max_prompts:
        raise InvalidRequest(f"prompt must hold at most {limits.max_prompts} prompts, got {count}.", param="prompt")
    wanted = check(asked, given, served, api.settings, num_prompts=count, default_max=DEFAULT_COMPLETION_TOKENS)
    form_request = check_form(asked, served, api.settings) if asked.asks_for_form else None
    infill = _infill(asked, served.tokenizer)
    encoder = encoder_for(asked, served, limits, request.receive)
    adds = asked.add_special_tokens is not False
    prompts = await encoder.prompts(asked.prompt, add_special_tokens=adds and infill is None)
    prompts = [truncate(prompt, asked, context) for prompt in prompts]
    if infill is not None:
        begin = await encoder.text("", add_special_tokens=adds)
        behind = await encoder.text(asked.suffix or "", add_special_tokens=False)
        prompts = [begin + infill.prompt(prompt, behind) for prompt in prompts]
    echoes = await _echoes(asked, prompts, encoder)
    form = PLAIN
    if form_request is not None:
        form = await form_request.form(prompts[0], served, api.settings, request.receive)
    await served.ready(record)
    generation = start(served, asked, wanted, prompts, record, prompt_field="prompt", form=form)
    answer = partial(
        CompletionAnswer,
        generation,
        asked,
        prompts,
        echoes,
        served.tokenizer,
        id=f"cmpl-{record.request_id}",
        model=served.name,
        system_fingerprint=fingerprint(f"{service.label}{served.key}", api.settings.model.dtype),
    )
    return await respond(generation, answer, record, request.receive, stream=bool(asked.stream))


def _infill(asked: CompletionRequest, tokenizer: Tokenizer) -> InfillTokens | None:
    """Tokens around prompt and suffix; None without a suffix. Raises `Unsupported`."""
    if not asked.suffix:
        return None
    if (found := tokenizer.infill) is None:
        raise Unsupported(
            "`suffix`: the model has no tokens to fill in a middle; put the text behind it into the prompt.",
            param="suffix",
        )
    for name in ("echo", "truncate_prompt_tokens"):
        if getattr(asked, name):
            raise Unsupported(f"`{name}` with `suffix` is not supported.", param=name)
    return found


async def _echoes(asked: CompletionRequest, prompts: list[list[int]], encoder: PromptEncoder) -> list[str]:
    """Text before each prompt's output: the text that was sent, or the text of its token ids."""
    if not asked.echo:
        return [""] * len(prompts)
    if isinstance(asked.prompt, str) and asked.truncate_prompt_tokens is None:
        return [asked.prompt]
    return await encoder.texts(prompts, skip_special_tokens=asked.skip_special_tokens is not False)


class CompletionAnswer:
    """Renderer of generated output, whole or in chunks."""

    def __init__(
        self,
        generation: Generation,
        asked: CompletionRequest,
        prompts: list[list[int]],
        echoes: list[str],
        tokenizer: Tokenizer,
        **common: Any,
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs: dict[int, ChoiceLogprobs] = {}
        """Writers by choice, where log-probabilities are asked for."""
        self._generation = generation
        self._asked = asked
        self._prompts = prompts
        self._echoes = echoes
        self._choices = choices_of(asked)
        self._common = {**common, "created": generation.created}

    @cached_property
    def _writer(self) -> LogprobWriter:
        return logprob_writer(self._asked, self._tokenizer)

    def whole(self, outputs: list[Output]) -> TextCompletion:
        choices = [self._choice(index, output, echo=True, finish=True) for index, output in enumerate(outputs)]
        for choice in choices:
            choice.prompt_logprobs = self._of_prompt(choice.index // self._choices)
        return TextCompletion(**self._common, choices=choices, usage=self._generation.usage, metrics=self._times())

    async def chunks(self) -> AsyncGenerator[TextCompletion, None]:
        """The text, then the reason for the end in a chunk of its own, then the usage.

        Log-probabilities come with the text of their tokens, which can be held back for a few steps.
        """
        begun: set[int] = set()
        held: dict[int, Output] = {}
        async with aclosing(self._generation.outputs()) as outputs:
            async for index, delta in outputs:
                output = delta
                if self._asked.logprobs is not None:
                    output = held.pop(index).merge(delta) if index in held else delta
                    if not (output.text or output.finish_reason or self._asked.return_token_ids):
                        held[index] = output
                        continue
                first = index not in begun
                scored = self._generation.prompt_logprobs.get(index // self._choices, []) if first else []
                choice = await write_answer(
                    partial(self._choice, index, output, echo=first, finish=False), count_logprobs(scored)
                )
                begun.add(index)
                if choice.text or choice.token_ids or choice.logprobs or (first and self._asked.return_token_ids):
                    yield self._chunk(choice)
                if output.finish_reason is not None:
                    end = Output(id=output.id, finish_reason=output.finish_reason, stop_reason=output.stop_reason)
                    yield self._chunk(self._choice(index, end, echo=False, finish=True))
        if self._asked.wants_usage or self._asked.include_metrics:
            usage = self._generation.usage if self._asked.wants_usage else UNSET
            yield TextCompletion(**self._common, choices=[], usage=usage, metrics=self._times())

    def _times(self) -> AnswerTimes | UnsetType:
        return self._generation.times if self._asked.include_metrics else UNSET

    def _choice(self, index: int, output: Output, *, echo: bool, finish: bool) -> CompletionChoice:
        """A choice. `echo`: include the text before the output; `finish`: include the finish reason."""
        prompt = index // self._choices
        with_ids = bool(self._asked.return_token_ids)
        return CompletionChoice(
            index=index,
            text=(self._echoes[prompt] if echo else "") + output.text,
            finish_reason=output.finish_reason if finish else None,  # type: ignore[arg-type]
            stop_reason=output.stop_reason if finish else None,
            logprobs=self._logprobs_of(index, output, echo=echo),
            token_ids=output.token_ids if with_ids else UNSET,
            prompt_token_ids=self._prompts[prompt] if with_ids and echo else UNSET,
        )

    def _logprobs_of(self, index: int, output: Output, *, echo: bool) -> CompletionLogprobs | None:
        """Those of the output's tokens, and with `echo` of the prompt's before them."""
        if (count := self._asked.logprobs) is None:
            return None
        ids: list[int] = list(output.token_ids)
        logprobs: list[TokenLogprob | None] = list(output.logprobs)
        if echo and self._asked.echo:
            prompt = index // self._choices
            ids = self._prompts[prompt] + ids
            logprobs = [None, *self._generation.prompt_logprobs.get(prompt, []), *logprobs]
        if not ids:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = ChoiceLogprobs(self._writer, count)
        return self._logprobs[index].write(ids, logprobs)

    def _of_prompt(self, prompt: int) -> PromptLogprobs | None:
        if (count := self._asked.prompt_logprobs) is None:
            return None
        scored = self._generation.prompt_logprobs.get(prompt, [])
        asked = [TokenLogprob(one.logprob, one.rank, one.top[:count]) for one in scored]
        return self._writer.prompt(self._prompts[prompt], asked)

    def _chunk(self, choice: CompletionChoice) -> TextCompletion:
        usage: Any = None if self._asked.wants_usage else UNSET
        if self._asked.wants_running_usage:
            usage = self._generation.usage
        return TextCompletion(**self._common, choices=[choice], usage=usage)
