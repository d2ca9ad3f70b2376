"""POST /v1/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from litestar import Response, post
from msgspec import UNSET

from runtime.api.disconnect import unless_disconnected
from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.generation import Generation
from runtime.api.openai.intake import Intake
from runtime.api.openai.params import DEFAULT_COMPLETION_TOKENS, check_common, choices_of, truncate
from runtime.api.openai.prompts import count_prompts, encode_prompts
from runtime.api.openai.responses import Completion, CompletionChoice
from runtime.api.openai.schema import CompletionRequest
from runtime.api.openai.served import find_model
from runtime.api.openai.start import fingerprint, start, take_id
from runtime.api.sse import EventStream, with_end
from runtime.errors import InvalidRequest
from runtime.messages import Output
from runtime.tokenizer import Tokenizer

_intake = Intake(CompletionRequest)


@post("/v1/completions", status_code=200, opt={BODY: CompletionRequest})
async def create_completion(request: AnyRequest) -> Response[Completion]:
    """Continue one text or many, whole or streamed."""
    api = api_of(request)
    service = api.handle.require()
    asked = await _intake.read(request, api)
    served = find_model(service, asked.model)
    limits = api.settings.limits
    check_common(asked, limits, policy=api.settings.scheduler.policy)
    if (count := count_prompts(asked.prompt)) > limits.max_prompts:
        raise InvalidRequest(f"prompt must hold at most {limits.max_prompts} prompts, got {count}.", param="prompt")
    record = take_id(request, asked.request_id)
    context = service.max_model_len
    prompts = await encode_prompts(
        service.tokenizer,
        asked.prompt,
        context,
        add_special_tokens=asked.add_special_tokens is not False,
    )
    prompts = [truncate(prompt, asked, context) for prompt in prompts]
    await served.ready()
    generation = start(
        served, asked, prompts, record, limits, prompt_field="prompt", default_max=DEFAULT_COMPLETION_TOKENS
    )
    answer = _Answer(
        generation,
        asked,
        prompts,
        _echoes(asked, prompts, service.tokenizer),
        id=f"cmpl-{record.request_id}",
        model=served.name,
        system_fingerprint=fingerprint(f"{service.model_name}{served.key}", api.settings.model.dtype),
    )
    if asked.stream:
        return EventStream(with_end(answer.chunks(), record), generation.close)
    try:
        outputs = await unless_disconnected(request.receive, generation.collect())
    finally:
        generation.close()
    return Response(answer.whole(outputs))


def _echoes(asked: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """What comes before each prompt's output: the text that was sent, or that its token ids stand for."""
    if not asked.echo:
        return [""] * len(prompts)
    if isinstance(asked.prompt, str) and asked.truncate_prompt_tokens is None:
        return [asked.prompt]
    return [tokenizer.decode(prompt) for prompt in prompts]


class _Answer:
    """Renders what was generated, whole or in chunks."""

    def __init__(
        self,
        generation: Generation,
        asked: CompletionRequest,
        prompts: list[list[int]],
        echoes: list[str],
        **common: Any,
    ) -> None:
        self._generation = generation
        self._asked = asked
        self._prompts = prompts
        self._echoes = echoes
        self._choices = choices_of(asked)
        self._common = {**common, "created": generation.created}

    def whole(self, outputs: list[Output]) -> Completion:
        choices = [self._choice(index, output, echo=True, finish=True) for index, output in enumerate(outputs)]
        return Completion(**self._common, choices=choices, usage=self._generation.usage)

    async def chunks(self) -> AsyncGenerator[Completion, None]:
        """The text, then the reason for the end in a chunk of its own, then the usage."""
        begun: set[int] = set()
        async with aclosing(self._generation.outputs()) as outputs:
            async for index, output in outputs:
                choice = self._choice(index, output, echo=index not in begun, finish=False)
                first = index not in begun
                begun.add(index)
                if choice.text or choice.token_ids or (first and self._asked.return_token_ids):
                    yield self._chunk(choice)
                if output.finish_reason is not None:
                    end = Output(request_id="", finish_reason=output.finish_reason, stop_reason=output.stop_reason)
                    yield self._chunk(self._choice(index, end, echo=False, finish=True))
        if self._asked.wants_usage:
            yield Completion(**self._common, choices=[], usage=self._generation.usage)

    def _choice(self, index: int, output: Output, *, echo: bool, finish: bool) -> CompletionChoice:
        """`echo`: with what comes before the output; `finish`: with how it ended."""
        prompt = index // self._choices
        with_ids = bool(self._asked.return_token_ids)
        return CompletionChoice(
            index=index,
            text=(self._echoes[prompt] if echo else "") + output.text,
            finish_reason=output.finish_reason if finish else None,  # type: ignore[arg-type]
            stop_reason=output.stop_reason if finish else None,
            token_ids=output.token_ids if with_ids else UNSET,
            prompt_token_ids=self._prompts[prompt] if with_ids and echo else UNSET,
        )

    def _chunk(self, choice: CompletionChoice) -> Completion:
        usage: Any = None if self._asked.wants_usage else UNSET
        if self._asked.wants_running_usage:
            usage = self._generation.usage
        return Completion(**self._common, choices=[choice], usage=usage)
