"""POST /v1/responses; GET, DELETE and cancel of stored ones, and their input items."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import msgspec
from litestar import Response, delete, get, post
from litestar.exceptions import MethodNotAllowedException
from msgspec.structs import replace

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.body import Fields, read_body
from runtime.api.http.errors import to_request_error
from runtime.api.http.event_log import EventLogs
from runtime.api.http.query import ObjectPage, check_names, flag, integer, page_request
from runtime.api.http.record import RequestRecord, record_of
from runtime.api.http.sockets import PATH, SWITCHING, SocketMemory, memory_of
from runtime.api.http.sse import Events, EventStream, named_event, named_events, noted, unless_disconnected
from runtime.api.openai.chat import ChatAnswer, count_chat, open_chat
from runtime.api.openai.generation import Generation
from runtime.api.openai.logprobs import count_logprobs, write_answer
from runtime.api.openai.schema import ChatRequest, Intake, report_unknown
from runtime.api.responses.compaction import (
    MAX_SUMMARY_TOKENS,
    CompactedResponse,
    CompactionItem,
    CompactRequest,
    InputTokenCount,
    packed,
    with_request,
)
from runtime.api.responses.schema import (
    INSTEAD,
    NEUTRAL,
    DeletedResponse,
    Item,
    ReasoningOptions,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    ResponseTextFormat,
    TextOptions,
)
from runtime.api.responses.translate import (
    ResponseEvents,
    chat_body,
    check_included,
    ended,
    failed,
    items_of,
    messages_of,
    named_as_asked,
    new_id,
    output_of,
    unknown_inside,
    usage_of,
)
from runtime.errors import InvalidRequest, NotFound, StorageUnavailable, Unsupported
from runtime.messages import Output
from runtime.responses import ResponseStore, StoredResponse, missing_response
from settings.api import LimitSettings

ENDED = frozenset({"completed", "incomplete", "cancelled", "failed"})

MAX_EVENT_NUMBER = 2**31 - 1
"""Largest `starting_after`."""

_OWN = frozenset(ResponseRequest.__struct_fields__)
_CHAT = frozenset(ChatRequest.__struct_fields__) - {"messages", "n", "best_of", "max_tokens", "use_beam_search"}
_intake = Intake(ResponseRequest, neutral=NEUTRAL, instead=INSTEAD, passed=_CHAT)
_compactions = Intake(
    CompactRequest,
    neutral={name: NEUTRAL[name] for name in ("prompt_cache_options", "prompt_cache_retention", "service_tier")},
    instead=INSTEAD,
)
_chats = Intake(ChatRequest)
_stored = msgspec.json.Decoder(ResponseObject)
_items = msgspec.json.Decoder(list[dict[str, Any]])
_inputs = msgspec.json.Decoder(list[Any])


@post("/v1/responses", status_code=200, opt={BODY: ResponseRequest})
async def create_response(request: AnyRequest) -> Response[ResponseObject]:
    """Answer input items: whole, as a stream of events, or in the background to be fetched later."""
    api = api_of(request)
    asked, fields = await _read(request, api)
    memory = memory_of(request)
    remembered = _remembered(asked.previous_response_id, memory, api)
    needs_store = asked.store or asked.background or (asked.previous_response_id is not None and not remembered)
    store, tenant = _store(api) if needs_store else api.handle.responses, record_of(request).tenant
    before = remembered or await _conversation(asked.previous_response_id, store, tenant)
    with named_as_asked():
        chat, given = await _as_chat(asked, fields, _history(before), api.settings.limits)
        generation, make, record = await open_chat(request, api, chat, given)
    with ExitStack() as stack:
        stack.callback(generation.close)
        answer = make()
        # Storing is OpenAI's default: a server that cannot store refuses only what asks for it.
        store = None if asked.store is False else store
        keeper = _Keeper(store, memory if remembered or store is None else None, tenant, asked, before)
        response = _begun(asked, chat, answer, new_id("resp"), keeper)
        if asked.background:
            await keeper.put(response)
        if asked.stream:
            events = ResponseEvents(response, lambda: int(time.time()))
            named = named_events(
                _kept(events, answer, keeper, record),
                record,
                name=lambda event: event.type,
                failure=lambda error: ("error", next(events.failure(error))),
            )
            if not asked.background:
                return EventStream(named, stack.pop_all().close)
            log = api.event_logs.begin(response.id)
            api.background.start(response.id, _log_events(generation, named, events, keeper, api.event_logs))
            stack.pop_all()
            return EventStream(log.follow(0, _lost))
        if asked.background:
            api.background.start(response.id, _finish(generation, answer, response, keeper, record))
            stack.pop_all()
            return Response(response)
        outputs = await unless_disconnected(request.receive, generation.collect())
        response = await _whole(answer, response, outputs)
        await keeper.put(response)
        return Response(response)


@post("/v1/responses/input_tokens", status_code=200, opt={BODY: ResponseRequest})
async def count_input_tokens(request: AnyRequest) -> Response[InputTokenCount]:
    """The number of tokens that the prompt of a response has."""
    api = api_of(request)
    asked, fields = await _read(request, api)
    store = _store(api) if asked.previous_response_id is not None else None
    history = _history(await _conversation(asked.previous_response_id, store, record_of(request).tenant))
    with named_as_asked():
        chat, _ = await _as_chat(asked, fields, history, api.settings.limits)
        return Response(InputTokenCount(input_tokens=await count_chat(request, api, chat)))


async def _read(request: AnyRequest, api: Api) -> tuple[ResponseRequest, Mapping[str, msgspec.Raw]]:
    """The request's body, and its fields as they were given. Unknown fields are reported or refused."""
    limits = api.settings.limits
    body = await read_body(request, api.settings.server)
    asked, _, unknown, fields = await _intake.parse(body, limits)
    report_unknown(request, unknown + unknown_inside(fields), limits.unknown_fields)
    return asked, fields


@post("/v1/responses/compact", status_code=200, opt={BODY: CompactRequest})
async def compact_conversation(request: AnyRequest) -> Response[CompactedResponse]:
    """Summarise a conversation into one item, which the next response takes as input in its place."""
    api = api_of(request)
    service, tenant = api.handle.require(), record_of(request).tenant
    asked = await _compactions.read(request, api)
    if not asked.input and asked.previous_response_id is None:
        raise InvalidRequest("input must have at least one item.", param="input")
    store = _store(api) if asked.previous_response_id is not None else None
    messages = _history(await _conversation(asked.previous_response_id, store, tenant))
    if asked.instructions:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    if asked.input:
        messages += messages_of(items_of(ResponseRequest(input=asked.input)))
    body = {
        "model": asked.model,
        "messages": with_request(messages),
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_tokens": MAX_SUMMARY_TOKENS,
    }
    with named_as_asked():
        chat, given = (await _chats.parse(msgspec.json.encode(body), api.settings.limits))[:2]
        room = service.max_model_len - await count_chat(request, api, chat)
        chat = replace(chat, max_completion_tokens=max(1, min(MAX_SUMMARY_TOKENS, room)))
        generation, make, _ = await open_chat(request, api, chat, given)
    with ExitStack() as stack:
        stack.callback(generation.close)
        answer = make()
        whole = answer.whole(await unless_disconnected(request.receive, generation.collect()))
    item = CompactionItem(id=new_id("cmp"), encrypted_content=packed(whole.choices[0].message.content or ""))
    return Response(
        CompactedResponse(id=new_id("resp"), created_at=answer.created, output=[item], usage=usage_of(whole.usage))
    )


@get("/v1/responses/{response_id:str}")
async def retrieve_response(request: AnyRequest) -> Response[ResponseObject]:
    """A stored response, whole; or the events of one that was begun with `background` and `stream`, from behind the
    one with the number `starting_after`, to its end."""
    check_names(request, ("include", "include[]", "include_obfuscation", "starting_after", "stream"))
    check_included([*request.query_params.getall("include", []), *request.query_params.getall("include[]", [])])
    flag(request, "include_obfuscation")
    follows, api = flag(request, "stream"), api_of(request)
    after = integer(request, "starting_after", default=-1, least=0, most=MAX_EVENT_NUMBER)
    if after >= 0 and not follows:
        raise InvalidRequest("starting_after is for `stream`: the number of an event.", param="starting_after")
    found = await _store(api).get(_response_id(request), record_of(request).tenant)
    if follows:
        if (log := api.event_logs.get(found.id)) is None:
            raise Unsupported(
                "`stream`: the events of this response are not kept. Those of a response that was begun with "
                "`background` and `stream` are, for a while; leave `stream` out, and the response comes whole.",
                param="stream",
            )
        return EventStream(log.follow(after + 1, _lost))
    return Response(_stored.decode(found.response))


@delete("/v1/responses/{response_id:str}", status_code=200)
async def delete_response(request: AnyRequest) -> Response[DeletedResponse]:
    """Delete a stored response; one in the background is cancelled first."""
    check_names(request, ())
    api = api_of(request)
    store, tenant, response_id = _store(api), record_of(request).tenant, _response_id(request)
    await store.get(response_id, tenant)
    await api.background.cancel(response_id)
    await store.delete(response_id, tenant)
    api.event_logs.drop(response_id)
    return Response(DeletedResponse(id=response_id))


@post("/v1/responses/{response_id:str}/cancel", status_code=200)
async def cancel_response(request: AnyRequest) -> Response[ResponseObject]:
    """Cancel a response in the background. One that has ended stays as it is."""
    check_names(request, ())
    api = api_of(request)
    store, tenant, response_id = _store(api), record_of(request).tenant, _response_id(request)
    found = _stored.decode((await store.get(response_id, tenant)).response)
    if not found.background:
        raise InvalidRequest("Only responses in the background can be cancelled.", param="response_id")
    await api.background.cancel(response_id)
    stored = await store.get(response_id, tenant)
    response = _stored.decode(stored.response)
    if response.status not in ENDED:  # of a server that was ended since
        response = replace(response, status="cancelled")
        await store.put(replace(stored, response=msgspec.json.encode(response)))
    return Response(response)


@get("/v1/responses/{response_id:str}/input_items")
async def list_input_items(request: AnyRequest) -> Response[ObjectPage[Any]]:
    """The items that a response answered, those of the conversation before it among them; the newest first. `after`
    takes an id, `limit` up to 100, `order` asc or desc."""
    page = page_request(request, further=("include", "include[]"))
    check_included([*request.query_params.getall("include", []), *request.query_params.getall("include[]", [])])
    chain = await _store(api_of(request)).chain(_response_id(request), record_of(request).tenant, param="response_id")
    items = [item for stored in chain[:-1] for item in _all_items(stored)] + _inputs.decode(chain[-1].input)
    for number, item in enumerate(items):
        item.setdefault("id", f"item_{number}")
    if page.newest_first:
        items.reverse()
    if page.after is not None:
        places = [number for number, item in enumerate(items) if item["id"] == page.after]
        if not places:
            raise NotFound(f"There is no item `{page.after[:100]}`.", param="after")
        items = items[places[0] + 1 :]
    shown = items[: page.limit]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return Response(ObjectPage(data=shown, first_id=first, last_id=last, has_more=len(items) > page.limit))


@get(PATH, status_code=SWITCHING, include_in_schema=False)
async def open_socket(request: AnyRequest) -> Response[None]:
    """Admit a WebSocket, which asks here with the headers of its handshake. Any other GET is 405."""
    if memory_of(request) is None:
        raise MethodNotAllowedException(headers={"allow": "POST"})
    return Response(None)


ROUTES = (
    create_response,
    open_socket,
    count_input_tokens,
    compact_conversation,
    retrieve_response,
    delete_response,
    cancel_response,
    list_input_items,
)


# -- storing ---------------------------------------------------------------------------------------


class _Keeper:
    """Stores the states of one response, if it is to be stored; `memory` gets it complete, with what was before it."""

    def __init__(
        self,
        store: ResponseStore | None,
        memory: SocketMemory | None,
        tenant: str,
        asked: ResponseRequest,
        before: list[StoredResponse],
    ) -> None:
        self._store = store
        self._memory = memory
        self._tenant = tenant
        self._before = before
        keeps = store is not None or memory is not None
        self._input = msgspec.json.encode([_shown(item) for item in items_of(asked)]) if keeps else b""

    @property
    def stores(self) -> bool:
        return self._store is not None

    async def put(self, response: ResponseObject) -> None:
        """Raises `StorageUnavailable`."""
        if self._store is None and self._memory is None:
            return
        state = StoredResponse(
            id=response.id,
            tenant=self._tenant,
            created_at=float(response.created_at),
            previous_id=response.previous_response_id,
            input=self._input,
            response=msgspec.json.encode(response),
        )
        if self._store is not None:
            await self._store.put(state)
        if self._memory is not None and response.status in ("completed", "incomplete"):
            self._memory.keep([*self._before, state])


def _shown(item: Any) -> dict[str, Any]:
    """An input item as the API shows it: with an id, and without what it lacks."""
    fields: dict[str, Any] = {k: v for k, v in msgspec.to_builtins(item).items() if v is not None}
    if isinstance(fields.get("content"), str):
        kind = "output_text" if fields.get("role") == "assistant" else "input_text"
        fields["content"] = [{"type": kind, "text": fields["content"]}]
    fields["content"] = [{k: v for k, v in part.items() if v is not None} for part in fields.get("content", ())]
    if item.type != "message" and not fields["content"]:
        del fields["content"]
    if item.type == "reasoning":
        fields.setdefault("summary", [])
    else:
        fields.setdefault("status", "completed")
    return {"id": new_id("msg" if item.type == "message" else "item"), **fields}


def _all_items(stored: StoredResponse) -> list[dict[str, Any]]:
    output = msgspec.to_builtins(_stored.decode(stored.response).output)
    return [*_items.decode(stored.input), *output]


def _response_id(request: AnyRequest) -> str:
    return str(request.path_params["response_id"])


def _store(api: Api) -> ResponseStore:
    """Raises `EngineUnavailable` where nothing is stored."""
    return api.handle.require_responses()


def _remembered(previous: str | None, memory: SocketMemory | None, api: Api) -> list[StoredResponse]:
    """The conversation that the response `previous` ends, if the request came on a WebSocket that remembers it."""
    if previous is None or memory is None:
        return []
    found = memory.chain(previous)
    if found is None and api.handle.responses is None:
        raise missing_response(previous, param="previous_response_id")
    return found or []


async def _conversation(previous: str | None, store: ResponseStore | None, tenant: str) -> list[StoredResponse]:
    """The conversation that the stored response `previous` ends, oldest first."""
    if previous is None:
        return []
    assert store is not None, "required"
    chain = await store.chain(previous, tenant, param="previous_response_id")
    if _stored.decode(chain[-1].response).status not in ENDED:
        raise InvalidRequest("The previous response has not ended yet.", param="previous_response_id")
    return chain


def _history(chain: list[StoredResponse]) -> list[dict[str, Any]]:
    """Messages of a conversation."""
    return messages_of(msgspec.convert([item for stored in chain for item in _all_items(stored)], list[Item]))


# -- answering -------------------------------------------------------------------------------------


async def _as_chat(
    asked: ResponseRequest, fields: Fields, history: list[dict[str, Any]], limits: LimitSettings
) -> tuple[ChatRequest, frozenset[str]]:
    """The chat that a response is, checked as one, and the fields that it sets."""
    passed = {name: value for name, value in fields.items() if name in _CHAT and name not in _OWN}
    return (await _chats.parse(msgspec.json.encode({**passed, **chat_body(asked, history)}), limits))[:2]


def _begun(asked: ResponseRequest, chat: ChatRequest, answer: ChatAnswer, id: str, keeper: _Keeper) -> ResponseObject:
    """The response as it is before its first token."""
    given = asked.text or TextOptions()
    text = replace(given, format=given.format or ResponseTextFormat(type="text"), verbosity=given.verbosity or "medium")
    return ResponseObject(
        id=id,
        created_at=answer.created,
        status="in_progress",
        background=bool(asked.background),
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        max_tool_calls=asked.max_tool_calls,
        model=answer.model,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        prompt_cache_key=asked.prompt_cache_key,
        reasoning=asked.reasoning or ReasoningOptions(),
        safety_identifier=asked.safety_identifier,
        store=keeper.stores,
        temperature=chat.temperature,
        text=text,
        tool_choice=asked.tool_choice or "auto",
        tools=msgspec.to_builtins(asked.tools or []),
        top_logprobs=asked.top_logprobs or 0,
        top_p=chat.top_p,
        user=asked.user,
        metadata=asked.metadata or {},
    )


async def _whole(answer: ChatAnswer, response: ResponseObject, outputs: list[Output]) -> ResponseObject:
    def write() -> ResponseObject:
        chat = answer.whole(outputs)
        reason = chat.choices[0].finish_reason
        return ended(response, output_of(chat), chat.usage, reason, int(time.time()))

    return await write_answer(write, count_logprobs(*(output.logprobs for output in outputs)))


async def _finish(
    generation: Generation, answer: ChatAnswer, response: ResponseObject, keeper: _Keeper, record: RequestRecord
) -> None:
    """Complete a response in the background. One that fails says so in its `error`."""
    try:
        response = await _whole(answer, response, await generation.collect())
    except asyncio.CancelledError:
        response = replace(response, status="cancelled")
        raise
    except Exception as error:
        response = failed(response, to_request_error(error, record.request_id), [])
    finally:
        generation.close()
        await keeper.put(response)


async def _log_events(
    generation: Generation, named: Events, events: ResponseEvents, keeper: _Keeper, logs: EventLogs
) -> None:
    """Complete a response in the background, and keep its events as they come."""
    id = events.response.id
    try:
        async with aclosing(named):
            async for event in named:
                logs.append(id, event)
    except asyncio.CancelledError:
        last = events.cancel()
        await keeper.put(events.response)
        logs.append(id, named_event(last.type, last))
        raise
    finally:
        generation.close()
        logs.end(id)


def _lost(number: int) -> bytes:
    """The event that ends a stream whose log was dropped."""
    message = "The events of this response are no longer kept; fetch it whole."
    return named_event(
        "error", ResponseEvent(type="error", sequence_number=number, code="events_dropped", message=message)
    )


async def _kept(
    events: ResponseEvents, answer: ChatAnswer, keeper: _Keeper, record: RequestRecord
) -> AsyncGenerator[ResponseEvent, None]:
    """The events of an answer. The response is stored before the event that ends it, that of a failure too."""
    try:
        async with aclosing(events.events(answer.chunks())) as found:
            async for event in found:
                if event.type in _LAST:
                    await keeper.put(events.response)
                yield event
    except Exception as error:
        last = list(events.failure(noted(error, record)))
        with suppress(StorageUnavailable):
            await keeper.put(events.response)
        for event in last:
            yield event


_LAST = frozenset(f"response.{status}" for status in ENDED)
