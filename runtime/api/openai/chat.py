"""POST /v1/chat/completions, and /v1/chat/completions/batch for several chats at once."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import cached_property, partial
from typing import Any

from litestar import Response, post
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.record import RequestRecord
from runtime.api.openai.answers import AnswerParser, Piece, count_reasoning, new_call_id
from runtime.api.openai.forms import PLAIN, AnswerForm, check_form
from runtime.api.openai.generation import Generation, encoder_for, fingerprint, logprob_writer, respond, start, take_id
from runtime.api.openai.logprobs import ChatLogprobs, LogprobWriter
from runtime.api.openai.models import resolve_model
from runtime.api.openai.options import check, choices_of, truncate
from runtime.api.openai.prompts import PromptEncoder, chat_prompt
from runtime.api.openai.responses import (
    AnswerTimes,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    CompletionTokensDetails,
    Finish,
    FunctionCall,
    FunctionDelta,
    MessageToolCall,
    ToolCallChunk,
    Usage,
)
from runtime.api.openai.schema import BatchChatRequest, ChatRequest, Intake
from runtime.api.openai.stored_chats import ChatKeeper
from runtime.errors import InvalidRequest
from runtime.messages import Output
from runtime.text.tokenizer import Tokenizer

_intake = Intake(ChatRequest)
_batch_intake = Intake(BatchChatRequest)


@post("/v1/chat/completions", status_code=200, opt={BODY: ChatRequest})
async def create_chat_completion(request: AnyRequest) -> Response[ChatCompletion]:
    """Answer a chat, whole or streamed."""
    api = api_of(request)
    asked, given = await _intake.read_given(request, api)
    keeper = ChatKeeper(request, asked) if asked.store else None
    generation, answer, record = await open_chat(request, api, asked, given, id=keeper.id if keeper else None)
    keep = None if keeper is None else keeper.keep
    return await respond(generation, answer, record, request.receive, stream=bool(asked.stream), keep=keep)


@post("/v1/chat/completions/batch", status_code=200, opt={BODY: BatchChatRequest})
async def create_batch_of_chats(request: AnyRequest) -> Response[ChatCompletion]:
    """Answer several chats with the same options: a choice for each, in their order. vLLM's; not streamed."""
    api = api_of(request)
    asked, given = await _batch_intake.read_given(request, api)
    most = api.settings.limits.max_prompts
    if not 1 <= len(asked.messages) <= most:
        raise InvalidRequest(f"messages must hold 1 to {most} chats, got {len(asked.messages)}.", param="messages")
    for field, wanted, how in (
        ("stream", asked.stream, "whole"),
        ("n", choices_of(asked) != 1, "by one choice each"),
        ("tools", asked.tools, "without tools"),
        ("store", asked.store, "without being stored"),
        ("prompt_logprobs", asked.prompt_logprobs is not None, "without what belongs to one prompt"),
    ):
        if wanted:
            raise InvalidRequest(
                f"`{field}`: chats in a batch are answered {how}; send them one by one, or in /v1/batches.", param=field
            )
    chats = asked.chats()
    generation, answer, record = await open_chat(request, api, chats[0], given, further=chats[1:])
    return await respond(generation, answer, record, request.receive, stream=False)


async def open_chat(
    request: AnyRequest,
    api: Api,
    asked: ChatRequest,
    given: frozenset[str],
    *,
    further: Sequence[ChatRequest] = (),
    id: str | None = None,
) -> tuple[Generation, Callable[[], "ChatAnswer"], RequestRecord]:
    """Check a chat and submit its sequences: the generation, what makes the renderer of its answer, and the request's
    record. `given`: the fields that the client set; `further`: chats that differ from `asked` in their messages only;
    `id`: the answer's, by default one with the request's. Other APIs than OpenAI's translate their bodies into `asked`,
    and what the renderer makes into theirs."""
    service = api.handle.require()
    served = await resolve_model(service, asked.model)
    record = take_id(request, asked.request_id, served)
    count = 1 + len(further)
    wanted = check(asked, given, served, api.settings, num_prompts=count, default_max=None)
    form_request = None
    if asked.asks_for_form or served.reasoning is not None:
        form_request = check_form(asked, served, api.settings)
    limits, template = api.settings.limits, served.tokenizer.chat_template
    encoder = encoder_for(asked, served, limits, request.receive)
    chats, prompts, form = [], [], PLAIN
    for index, one in enumerate((asked, *further)):
        with _naming_chat(index if further else None):
            chat = chat_prompt(
                one,
                template,
                limits,
                tools=() if form_request is None else form_request.shown_tools,
                variables={} if form_request is None else form_request.template_kwargs,
                trust_template=api.settings.model.trust_request_chat_template,
            )
            chats.append(chat)
            prompts.append(truncate(await encoder.chat(chat), asked, service.max_model_len))
        if form_request is not None:
            first, form = form, await form_request.form(prompts[-1], served, api.settings, request.receive)
            if index and form != first:
                raise InvalidRequest(
                    f"messages[{index}]: this chat's answer begins otherwise than the first one's, inside or out "
                    "of reasoning; send it on its own.",
                    param=f"messages[{index}]",
                )
    await served.ready(record)
    generation = start(served, asked, wanted, prompts, record, prompt_field="messages", form=form)
    answer = partial(
        ChatAnswer,
        generation,
        asked,
        prompts,
        # As in vLLM: a message that goes on keeps its role.
        [api.settings.server.response_role if chat.add_generation_prompt else chat.last_role for chat in chats],
        form,
        served.tokenizer,
        id=id or f"chatcmpl-{record.request_id}",
        model=served.name,
        system_fingerprint=fingerprint(f"{service.label}{served.key}", api.settings.model.dtype),
    )
    return generation, answer, record


async def count_chat(request: AnyRequest, api: Api, asked: ChatRequest) -> int:
    """The number of tokens of a chat's prompt, which may exceed the context. Raises the errors that answering it
    would."""
    service, limits = api.handle.require(), api.settings.limits
    served = await resolve_model(service, asked.model)
    form = check_form(asked, served, api.settings)
    chat = chat_prompt(
        asked,
        served.tokenizer.chat_template,
        limits,
        tools=form.shown_tools,
        variables=form.template_kwargs,
        trust_template=api.settings.model.trust_request_chat_template,
    )
    apart, limit = served.own_tokenizer is not None, limits.max_tokenize_chars
    encoder = PromptEncoder(served.tokenizer, served.vocab_size, None, limit, request.receive, apart=apart)
    return len(await encoder.chat(chat))


@contextmanager
def _naming_chat(index: int | None) -> Iterator[None]:
    """Add a chat's place in a batch to the paths of errors about its messages."""
    try:
        yield
    except InvalidRequest as error:
        if index is not None and error.param is not None and error.param.startswith("messages"):
            whole = f"messages[{index}]{error.param.removeprefix('messages')}"
            error.message = error.message.replace(error.param, whole)
            error.param = whole
        raise


class ChatAnswer:
    """Renderer of generated output, whole or in chunks."""

    def __init__(
        self,
        generation: Generation,
        asked: ChatRequest,
        prompts: list[list[int]],
        roles: list[str],
        form: AnswerForm,
        tokenizer: Tokenizer,
        **common: Any,
    ) -> None:
        """`prompts` and `roles` of the answers: one of each for a chat, of which there may be several."""
        self._generation = generation
        self._asked = asked
        self._prompt = prompts[0]
        self._roles = roles
        self._choices = choices_of(asked)
        self._form = form
        self._tokenizer = tokenizer
        self._prompt_ids = prompts[0] if asked.return_token_ids and len(prompts) == 1 else UNSET
        self._common = {**common, "created": generation.created}
        self.created = generation.created
        self.model: str = common["model"]
        self._ids: dict[int, list[int]] = {}
        """Tokens of each choice so far, where reasoning is counted."""
        self._call_ids: dict[tuple[int, int], str] = {}

    @cached_property
    def _writer(self) -> LogprobWriter:
        return logprob_writer(self._asked, self._tokenizer)

    def whole(self, outputs: list[Output]) -> ChatCompletion:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        self._ids = {index: output.token_ids for index, output in enumerate(outputs)}
        scored = self._generation.prompt_logprobs.get(0, [])
        return ChatCompletion(
            **self._common,
            choices=choices,
            usage=self._usage,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=None if self._asked.prompt_logprobs is None else self._writer.prompt(self._prompt, scored),
            metrics=self._times(),
        )

    def _choice(self, index: int, output: Output) -> ChatChoice:
        parser = self._parser()
        if parser is None:
            message = AssistantMessage(role=self._role(index), content=output.text)
        else:
            message = self._message(index, [*parser.feed(output.text), *parser.finish()])
        return ChatChoice(
            index=index,
            message=message,
            finish_reason=_finish(output, parser),
            stop_reason=output.stop_reason,
            logprobs=self._writer.chat(output.token_ids, output.logprobs) if self._asked.logprobs else None,
            token_ids=output.token_ids if self._asked.return_token_ids else UNSET,
        )

    def _message(self, index: int, pieces: list[Piece]) -> AssistantMessage:
        calls: list[MessageToolCall] = []
        for piece in pieces:
            if (call := piece.call) is not None:
                if call.name is not None:
                    id = self._call_id(index, call.index)
                    calls.append(MessageToolCall(id=id, function=FunctionCall(name=call.name, arguments="")))
                calls[call.index].function.arguments += call.arguments
        content = "".join(piece.content for piece in pieces)
        message = AssistantMessage(role=self._role(index), content=None if calls and not content else content)
        if calls:
            message.tool_calls = calls
        if self._form.reasoning is not None and self._form.includes_reasoning:
            message.reasoning_content = "".join(piece.reasoning for piece in pieces) or None
            message.reasoning = message.reasoning_content
        return message

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """The role first, then what the answer is made of, then the reason for the end in a chunk of its own, then the
        usage.

        Log-probabilities come with the text of their tokens, which can be held back for a few steps.
        """
        parsers: dict[int, AnswerParser | None] = {}
        held: dict[int, Output] = {}
        counts = self._form.reasoning is not None
        async with aclosing(self._generation.outputs()) as outputs:
            async for index, output in outputs:
                if index not in parsers:
                    parsers[index] = self._parser()
                    first = ChatChunkChoice(index=index, delta=ChatDelta(role=self._role(index), content=""))
                    yield self._chunk(first, prompt_ids=self._prompt_ids, before=output)
                parser = parsers[index]
                if counts:
                    self._ids.setdefault(index, []).extend(output.token_ids)
                deltas = [ChatDelta(content=output.text)] if parser is None and output.text else []
                if parser is not None:
                    pieces = [*parser.feed(output.text), *(parser.finish() if output.finish_reason is not None else ())]
                    deltas += [self._delta(index, piece) for piece in pieces]
                ids = output.token_ids if self._asked.return_token_ids else UNSET
                logprobs = self._logprobs(held, index, output) if self._asked.logprobs else None
                if (ids or logprobs) and not deltas:
                    deltas.append(ChatDelta(content=""))
                for delta in deltas:
                    yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, token_ids=ids))
                    ids, logprobs = [] if ids else UNSET, None
                if output.finish_reason is not None:
                    yield self._chunk(
                        ChatChunkChoice(
                            index=index,
                            delta=ChatDelta(),
                            finish_reason=_finish(output, parser),
                            stop_reason=output.stop_reason,
                        )
                    )
        if self._asked.wants_usage or self._asked.include_metrics:
            usage = self._usage if self._asked.wants_usage else UNSET
            yield ChatChunk(**self._common, choices=[], usage=usage, metrics=self._times())

    def _role(self, index: int) -> str:
        return self._roles[index // self._choices]

    def _times(self) -> AnswerTimes | UnsetType:
        return self._generation.times if self._asked.include_metrics else UNSET

    def _parser(self) -> AnswerParser | None:
        """Parser of one answer; None where all of it is content."""
        return None if self._form.plain else AnswerParser(self._form)

    def _call_id(self, index: int, call: int) -> str:
        """The id of a choice's call: the same however often the answer is rendered."""
        if (index, call) not in self._call_ids:
            self._call_ids[index, call] = new_call_id(self._form)
        return self._call_ids[index, call]

    def _delta(self, index: int, piece: Piece) -> ChatDelta:
        if (call := piece.call) is not None:
            chunk = ToolCallChunk(index=call.index, function=FunctionDelta(arguments=call.arguments))
            if call.name is not None:
                chunk.id, chunk.type, chunk.function.name = self._call_id(index, call.index), "function", call.name
            return ChatDelta(tool_calls=[chunk])
        if piece.reasoning:
            return ChatDelta(reasoning_content=piece.reasoning, reasoning=piece.reasoning)
        return ChatDelta(content=piece.content)

    @property
    def _usage(self) -> Usage:
        usage = self._generation.usage
        if self._form.reasoning is None:
            return usage
        count = sum(count_reasoning(ids, self._form, self._tokenizer) for ids in self._ids.values())
        return replace(usage, completion_tokens_details=CompletionTokensDetails(count))

    def _logprobs(self, held: dict[int, Output], index: int, output: Output) -> ChatLogprobs | None:
        """Those of a choice's tokens up to here, once there is text or they end; until then they are `held`."""
        waiting = held.pop(index, None)
        whole = output if waiting is None else waiting.merge(output)
        if output.text or output.finish_reason is not None:
            return self._writer.chat(whole.token_ids, whole.logprobs) if whole.token_ids else None
        held[index] = whole
        return None

    def _chunk(self, choice: ChatChunkChoice, prompt_ids: Any = UNSET, before: Output | None = None) -> ChatChunk:
        """A chunk. `before`: report the usage before this output, none of which is in the chunk."""
        usage: Any = None if self._asked.wants_usage else UNSET
        if self._asked.wants_running_usage:
            usage = self._generation.usage_before(before) if before is not None else self._generation.usage
        return ChatChunk(**self._common, choices=[choice], usage=usage, prompt_token_ids=prompt_ids)


def _finish(output: Output, parser: AnswerParser | None) -> Finish:
    """The reason for an end; an answer that ended with calls says so."""
    if output.finish_reason == "stop" and parser is not None and parser.num_calls:
        return "tool_calls"
    return "length" if output.finish_reason == "length" else "stop"
