"""POST /v1/chat/completions."""

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
from runtime.api.openai.messages import chat_prompt
from runtime.api.openai.params import check_common, truncate
from runtime.api.openai.prompts import encode_chat
from runtime.api.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
)
from runtime.api.openai.schema import ChatRequest
from runtime.api.openai.served import find_model
from runtime.api.openai.start import fingerprint, start, take_id
from runtime.api.sse import EventStream, with_end
from runtime.messages import Output

_intake = Intake(ChatRequest)


@post("/v1/chat/completions", status_code=200, opt={BODY: ChatRequest})
async def create_chat_completion(request: AnyRequest) -> Response[ChatCompletion]:
    """Answer a chat, whole or streamed."""
    api = api_of(request)
    service = api.handle.require()
    asked = await _intake.read(request, api)
    served = find_model(service, asked.model)
    limits = api.settings.limits
    check_common(asked, limits, policy=api.settings.scheduler.policy)
    record = take_id(request, asked.request_id)
    chat = chat_prompt(asked, service.tokenizer.chat_template, max_messages=limits.max_messages)
    prompt = await encode_chat(service.tokenizer, chat, service.max_model_len)
    prompt = truncate(prompt, asked, service.max_model_len)
    await served.ready()
    generation = start(served, asked, [prompt], record, limits, prompt_field="messages", default_max=None)
    answer = _Answer(
        generation,
        asked,
        prompt,
        id=f"chatcmpl-{record.request_id}",
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


class _Answer:
    """Renders what was generated, whole or in chunks."""

    def __init__(self, generation: Generation, asked: ChatRequest, prompt: list[int], **common: Any) -> None:
        self._generation = generation
        self._asked = asked
        self._prompt_ids = prompt if asked.return_token_ids else UNSET
        self._common = {**common, "created": generation.created}

    def whole(self, outputs: list[Output]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=output.text),
                finish_reason=output.finish_reason,  # type: ignore[arg-type]  # the others were raised
                stop_reason=output.stop_reason,
                token_ids=output.token_ids if self._asked.return_token_ids else UNSET,
            )
            for index, output in enumerate(outputs)
        ]
        return ChatCompletion(
            **self._common, choices=choices, usage=self._generation.usage, prompt_token_ids=self._prompt_ids
        )

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """The role first, then the text, then the reason for the end in a chunk of its own, then the usage."""
        begun: set[int] = set()
        async with aclosing(self._generation.outputs()) as outputs:
            async for index, output in outputs:
                if index not in begun:
                    begun.add(index)
                    first = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
                    yield self._chunk(first, prompt_ids=self._prompt_ids)
                ids = output.token_ids if self._asked.return_token_ids else UNSET
                if output.text or ids:
                    delta = ChatDelta(content=output.text)
                    yield self._chunk(ChatChunkChoice(index=index, delta=delta, token_ids=ids))
                if output.finish_reason is not None:
                    yield self._chunk(
                        ChatChunkChoice(
                            index=index,
                            delta=ChatDelta(),
                            finish_reason=output.finish_reason,  # type: ignore[arg-type]
                            stop_reason=output.stop_reason,
                        )
                    )
        if self._asked.wants_usage:
            yield ChatChunk(**self._common, choices=[], usage=self._generation.usage)

    def _chunk(self, choice: ChatChunkChoice, prompt_ids: Any = UNSET) -> ChatChunk:
        usage: Any = None if self._asked.wants_usage else UNSET
        if self._asked.wants_running_usage:
            usage = self._generation.usage
        return ChatChunk(**self._common, choices=[choice], usage=usage, prompt_token_ids=prompt_ids)
