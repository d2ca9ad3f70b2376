"""Chats that were asked for with `store: true`: kept with their messages, and listed, retrieved, labelled and deleted
under /v1/chat/completions. They share the store of responses, and its retention."""

import time
import uuid
from typing import cast

import msgspec
from litestar import Response, delete, get, post
from msgspec import UNSET, Struct, UnsetType, field

from runtime.api.docs import BODY, QUERY, page_query
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.query import MAX_PAGE, ObjectPage, check_names, metadata_filter, object_page, page_request, single
from runtime.api.http.record import record_of
from runtime.api.openai.batches import check_metadata
from runtime.api.openai.responses import ChatCompletion
from runtime.api.openai.schema import ChatMessage, ChatRequest, ContentPart, Intake, ToolCall
from runtime.errors import NotFound
from runtime.responses import ResponseStore, StoredChat


class StoredCompletion(ChatCompletion, kw_only=True):
    """A stored chat's answer, with the labels of its request."""

    metadata: dict[str, str] = field(default_factory=dict)


class StoredMessage(Struct, kw_only=True):
    """A message of a stored chat's prompt, in OpenAI's shape."""

    id: str
    role: str
    content: str | None = None
    content_parts: list[ContentPart] | None = None
    """The parts, of a message that was sent in parts; its `content` is then null."""
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class ChatUpdate(Struct, kw_only=True):
    """The one thing of a stored chat that can be changed."""

    metadata: dict[str, str] | None


class DeletedCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion.deleted"
    deleted: bool = True


_updates = Intake(ChatUpdate)
_messages = msgspec.json.Decoder(list[StoredMessage])


class ChatKeeper:
    """Stores the chat of one request, once its answer is whole."""

    def __init__(self, request: AnyRequest, asked: ChatRequest) -> None:
        """Raises `EngineUnavailable` where nothing is stored."""
        self._store = _store(api_of(request))
        self._tenant = record_of(request).tenant
        self._asked = asked
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        """The answer's id: no label of the client's, which may come twice."""

    async def keep(self, completion: ChatCompletion) -> None:
        """Raises `StorageUnavailable`, `PayloadTooLarge`."""
        asked = self._asked
        messages = [_shown(f"{self.id}-{number}", message) for number, message in enumerate(asked.messages)]
        chat = StoredChat(
            id=self.id,
            tenant=self._tenant,
            created_at=time.time(),
            model=completion.model,
            metadata=asked.metadata or {},
            messages=msgspec.json.encode(messages),
            completion=msgspec.json.encode(completion),
        )
        await self._store.add_chat(chat)


def _shown(id: str, message: ChatMessage) -> StoredMessage:
    content = message.content
    return StoredMessage(
        id=id,
        role=message.role,
        content=content if isinstance(content, str) else None,
        content_parts=content if isinstance(content, list) else None,
        name=message.name,
        refusal=message.refusal,
        tool_calls=message.tool_calls or UNSET,
        tool_call_id=message.tool_call_id or UNSET,
    )


@get("/v1/chat/completions", opt={QUERY: page_query(MAX_PAGE, model={"type": "string"})})
async def list_chat_completions(request: AnyRequest) -> Response[ObjectPage[StoredCompletion]]:
    """Stored chats, the oldest first. `after` takes an id, `limit` up to 100, `order` asc or desc; with `model` and
    `metadata[key]` only chats that have them. Long answers make shorter pages."""
    metadata, names = metadata_filter(request)
    page = page_request(request, newest_first=False, further=("model", *names))
    check_metadata(metadata, api_of(request).settings.limits)
    chats, more = await _store(api_of(request)).chats(
        record_of(request).tenant, model=single(request, "model"), metadata=metadata, **page._asdict()
    )
    first, last = (chats[0].id, chats[-1].id) if chats else (None, None)
    return Response(ObjectPage(data=list(map(_view, chats)), first_id=first, last_id=last, has_more=more))


@get("/v1/chat/completions/{completion_id:str}")
async def retrieve_chat_completion(request: AnyRequest) -> Response[StoredCompletion]:
    """A stored chat's answer."""
    check_names(request, ())
    return Response(_view(await _store(api_of(request)).chat(_completion_id(request), record_of(request).tenant)))


@get("/v1/chat/completions/{completion_id:str}/messages", opt={QUERY: page_query(MAX_PAGE)})
async def list_chat_messages(request: AnyRequest) -> ObjectPage[StoredMessage]:
    """The messages that a stored chat answered, the first one first."""
    page = page_request(request, newest_first=False)
    chat = await _store(api_of(request)).chat(_completion_id(request), record_of(request).tenant)
    messages = _messages.decode(chat.messages)
    if page.newest_first:
        messages.reverse()
    if page.after is not None:
        places = [number for number, message in enumerate(messages) if message.id == page.after]
        if not places:
            raise NotFound(f"There is no message `{page.after[:100]}`.", param="after")
        messages = messages[places[0] + 1 :]
    return object_page(messages[: page.limit], len(messages) > page.limit)


@post("/v1/chat/completions/{completion_id:str}", status_code=200, opt={BODY: ChatUpdate})
async def update_chat_completion(request: AnyRequest) -> Response[StoredCompletion]:
    """Put other labels on a stored chat."""
    check_names(request, ())
    api = api_of(request)
    store = _store(api)
    asked = await _updates.read(request, api)
    check_metadata(asked.metadata, api.settings.limits)
    changed = await store.change_chat(_completion_id(request), record_of(request).tenant, asked.metadata or {})
    return Response(_view(changed))


@delete("/v1/chat/completions/{completion_id:str}", status_code=200)
async def delete_chat_completion(request: AnyRequest) -> Response[DeletedCompletion]:
    """Delete a stored chat."""
    check_names(request, ())
    completion_id = _completion_id(request)
    await _store(api_of(request)).delete_chat(completion_id, record_of(request).tenant)
    return Response(DeletedCompletion(id=completion_id))


ROUTES = (
    list_chat_completions,
    retrieve_chat_completion,
    list_chat_messages,
    update_chat_completion,
    delete_chat_completion,
)


def _view(chat: StoredChat) -> StoredCompletion:
    """As JSON, into which the labels are put: decoding a long answer would hold up the event loop."""
    metadata = msgspec.json.encode(chat.metadata)
    return cast(StoredCompletion, msgspec.Raw(b'{"metadata":' + metadata + b"," + chat.completion[1:]))


def _completion_id(request: AnyRequest) -> str:
    return str(request.path_params["completion_id"])


def _store(api: Api) -> ResponseStore:
    """Raises `EngineUnavailable` where nothing is stored."""
    return api.handle.require_responses("chats")
