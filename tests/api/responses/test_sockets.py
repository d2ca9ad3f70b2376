"""/v1/responses over a WebSocket: over the app alone, and over a real one."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, RejectConnection, RejectData, Request, TextMessage

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.http import sockets
from runtime.responses import ResponseStore
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.conftest import RunningServer
from tests.api.fakes import FakeService
from tests.waiting import until

pytestmark = pytest.mark.anyio
PATH = "/v1/responses"
LAST = ("response.completed", "response.incomplete", "response.failed", "error")
SHORT = {"max_output_tokens": 3}


class Socket:
    """One WebSocket to an ASGI app."""

    def __init__(self, app: Any, path: str = PATH, **headers: str) -> None:
        self.sent: list[dict[str, Any]] = []
        self._read = 0
        self._arrived = asyncio.Event()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        given = {"host": "127.0.0.1", "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        given |= {name.lower().replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "scheme": "ws",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "subprotocols": [],
            "state": {},
            "extensions": {"websocket.http.response": {}},
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._take))

    async def _take(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self._arrived.set()
        await asyncio.sleep(0)

    async def next(self) -> dict[str, Any]:
        """The next message of the app."""
        while len(self.sent) == self._read:
            self._arrived.clear()
            await self._arrived.wait()
        self._read += 1
        return self.sent[self._read - 1]

    def put(self, message: Any) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self._inbox.put_nowait({"type": "websocket.receive", "text": text, "bytes": None})

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})

    async def events(self) -> list[dict[str, Any]]:
        """The events up to the one that ends a turn."""
        found: list[dict[str, Any]] = []
        while not found or found[-1]["type"] not in LAST:
            message = await self.next()
            assert message["type"] == "websocket.send"
            found.append(json.loads(message["text"]))
        return found

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """The event that ends the turn."""
        self.put({"type": "response.create", **SHORT, **fields})
        return (await self.events())[-1]

    async def refusal(self) -> tuple[int, str]:
        """Status and code of a handshake that is refused."""
        start, body = await self.next(), await self.next()
        assert start["type"] == "websocket.http.response.start"
        return start["status"], json.loads(body["body"])["error"]["code"]


@contextlib.asynccontextmanager
async def opened(app: Any, **headers: str) -> AsyncIterator[Socket]:
    one = Socket(app, **headers)
    try:
        assert (await one.next())["type"] == "websocket.accept"
        yield one
    finally:
        one.leave()
        await asyncio.wait_for(one.task, 5)


def app_of(service: FakeService, store: ResponseStore | None = None, settings: Settings | None = None) -> Any:
    handle = ServiceHandle(service)  # type: ignore[arg-type]
    handle.responses = store
    app = create_app(handle, settings or Settings())

    async def called(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return called


def code_of(event: dict[str, Any]) -> str:
    assert event["type"] == "error", event
    return str(event["error"]["code"])


async def test_the_events_are_those_of_a_stream(service: FakeService) -> None:
    app = app_of(service)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        streamed = (await client.post(PATH, json={"input": "Hi", "stream": True, **SHORT})).text
    async with opened(app, x_request_id="mine") as one:
        for _ in range(2):  # each turn is a response of its own, whatever id the handshake had
            one.put({"type": "response.create", "input": "Hi", **SHORT})
            events = await one.events()
            assert [event["type"] for event in events] == [
                line.removeprefix("event: ") for line in streamed.splitlines() if line.startswith("event: ")
            ]
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert events[-1]["response"]["output"][0]["content"][0]["text"] == "use"
    ids = {event["response"]["id"] for event in map(json.loads, texts(one)) if "response" in event}
    assert len(ids) == 2
    assert "resp_mine" not in ids


def texts(one: Socket) -> list[str]:
    return [message["text"] for message in one.sent if message["type"] == "websocket.send"]


async def test_what_is_not_stored_goes_on_where_it_came(service: FakeService, store: ResponseStore) -> None:
    app = app_of(service, store)
    async with opened(app) as one:
        first = (await one.ask(input="Hi", store=False))["response"]
        assert first["store"] is False
        second = (await one.ask(input="More", store=False, previous_response_id=first["id"]))["response"]
        assert second["previous_response_id"] == first["id"]
        prompt = bytes(service.submitted[-1].prompt_ids).decode()
        assert prompt.index("user: Hi") < prompt.index("assistant: use") < prompt.index("user: More")
        third = (await one.ask(input="End", store=False, previous_response_id=second["id"]))["response"]
        assert bytes(service.submitted[-1].prompt_ids).decode().count("user: ") == 3
        # Only the last one is remembered.
        assert code_of(await one.ask(input="x", previous_response_id=first["id"])) == "previous_response_not_found"
    async with opened(app) as other:
        asked = {"input": "x", "store": False, "previous_response_id": third["id"]}
        event = await other.ask(**asked)
        assert (code_of(event), event["status"], event["error"]["param"]) == (
            "previous_response_not_found", 404, "previous_response_id",
        )  # fmt: skip
        assert (await other.ask(input="again", store=False))["type"] == "response.incomplete"


async def test_what_is_stored_goes_on_anywhere(service: FakeService, store: ResponseStore) -> None:
    app = app_of(service, store)
    async with opened(app) as one:
        first = (await one.ask(input="Hi"))["response"]
    async with opened(app) as other:
        assert (await other.ask(input="More", previous_response_id=first["id"]))["type"] == "response.incomplete"
    assert "user: Hi" in bytes(service.submitted[-1].prompt_ids).decode()


async def test_a_server_without_a_store_remembers_too(service: FakeService) -> None:
    async with opened(app_of(service)) as one:
        first = (await one.ask(input="Hi"))["response"]
        assert (await one.ask(input="More", previous_response_id=first["id"]))["type"] == "response.incomplete"
        assert code_of(await one.ask(input="x", previous_response_id="resp_x")) == "previous_response_not_found"


@pytest.mark.parametrize("how", ["refused", "failed"])
async def test_a_turn_that_fails_forgets_what_it_continued(service: FakeService, how: str) -> None:
    async with opened(app_of(service)) as one:
        first = (await one.ask(input="Hi"))["response"]["id"]
        if how == "refused":
            orphan = {"type": "function_call_output", "call_id": "call_x", "output": "x"}
            assert (await one.ask(input=[orphan], previous_response_id=first))["status"] == 400
        else:
            service.fail_after = 1
            failed = await one.ask(input="More", previous_response_id=first)
            assert (failed["type"], failed["response"]["error"]["type"]) == ("response.failed", "engine_failure")
            service.fail_after = None
        assert code_of(await one.ask(input="More", previous_response_id=first)) == "previous_response_not_found"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("no JSON", None),
        ([], None),
        ({"input": "Hi"}, "type"),
        ({"type": "response.cancel"}, "type"),
        ({"type": "response.create", "input": "Hi", "stream": False}, "stream"),
        ({"type": "response.create", "input": "Hi", "generate": False}, "generate"),
        ({"type": "response.create", "input": "Hi", "background": True}, "background"),
        ({"type": "response.create", "input": "Hi", "temperature": -1}, "temperature"),
        ({"type": "response.create", "input": "Hi", "previous_response_id": 7}, "previous_response_id"),
        ({"type": "response.create"}, "input"),
    ],
)
async def test_a_wrong_message_is_named_and_the_next_is_answered(
    service: FakeService, message: Any, param: str | None
) -> None:
    async with opened(app_of(service)) as one:
        one.put(message)
        (event,) = await one.events()
        assert (event["type"], event["status"], event["error"]["param"]) == ("error", 400, param)
        assert event["error"]["code"]
        assert (await one.ask(input="Hi"))["type"] == "response.incomplete"


async def test_messages_are_answered_in_their_order(service: FakeService) -> None:
    async with opened(app_of(service)) as one:
        for text in "abc":
            one.put({"type": "response.create", "input": text, **SHORT})
        for _ in range(3):
            assert (await one.events())[0]["sequence_number"] == 0
    assert [bytes(each.prompt_ids).decode()[6] for each in service.submitted] == ["a", "b", "c"]


@pytest.mark.parametrize("much", ["many", "long"])
async def test_a_client_that_sends_too_much_ahead_is_closed(service: FakeService, much: str) -> None:
    service.stall_after = 1
    app = app_of(service, settings=Settings(server=ServerSettings(max_body=1024)))
    one = Socket(app)
    one.put({"type": "response.create", "input": "Hi"})
    await until(lambda: service.running)
    for _ in range(sockets.MAX_WAITING + 1 if much == "many" else 2):
        one.put({"type": "response.create", "input": "x" * (1 if much == "many" else 600)})
    await asyncio.wait_for(one.task, 5)
    assert (one.sent[-1]["type"], one.sent[-1]["code"]) == ("websocket.close", 1009)
    assert len(service.aborted) == 1


async def test_a_client_that_leaves_ends_its_request(service: FakeService) -> None:
    service.stall_after = 1
    async with opened(app_of(service)) as one:
        one.put({"type": "response.create", "input": "Hi"})
        await until(lambda: service.running)
    assert len(service.aborted) == 1


async def test_a_connection_has_an_end(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_SECONDS", 0.0)
    one = Socket(app_of(service))
    await asyncio.wait_for(one.task, 5)
    assert code_of(json.loads(texts(one)[0])) == "websocket_connection_limit_reached"
    assert (one.sent[-1]["type"], one.sent[-1]["code"]) == ("websocket.close", 1000)


def test_a_conversation_that_is_too_long_is_not_remembered() -> None:
    stored = sockets.StoredResponse("resp_1", "", 0.0, None, b"x" * 10, b"x" * 10)
    memory = sockets.SocketMemory(20)
    memory.keep([stored])
    assert memory.chain("resp_1") == [stored]
    memory.keep([stored, stored])
    assert memory.chain("resp_1") is None


# -- admission -------------------------------------------------------------------------------------


async def test_a_key_is_needed_where_one_is_for_posts(service: FakeService) -> None:
    settings = Settings(server=ServerSettings(api_key=("secret",)))
    app = app_of(service, settings=settings)
    assert await Socket(app).refusal() == (401, "missing_api_key")
    assert (await Socket(app, authorization="Bearer wrong").refusal())[0] == 401
    async with opened(app, authorization="Bearer secret") as one:
        assert (await one.ask(input="Hi"))["type"] == "response.incomplete"


async def test_pages_of_others_and_other_names_are_refused(service: FakeService) -> None:
    app = app_of(service)
    assert await Socket(app, origin="http://evil.example").refusal() == (403, "cross_origin")
    assert await Socket(app, host="evil.example").refusal() == (403, "host_not_allowed")


async def test_there_is_one_at_one_path(service: FakeService) -> None:
    assert await Socket(app_of(service), "/v1/chat/completions").refusal() == (404, "unknown_url")
    prefixed = app_of(service, settings=Settings(server=ServerSettings(root_path="/llm")))
    one = Socket(prefixed, "/llm" + PATH)
    assert (await one.next())["type"] == "websocket.accept"
    assert (await one.ask(input="Hi"))["type"] == "response.incomplete"
    one.leave()
    await one.task


async def test_a_get_that_is_no_handshake_is_told_so(service: FakeService) -> None:
    app = app_of(service)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        answer = await client.get(PATH, headers={"Upgrade": "websocket"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_each_turn_counts_among_the_limits_of_its_key(service: FakeService) -> None:
    app = app_of(service, settings=Settings(server=ServerSettings(api_key=("k1",), key_requests_per_minute=2)))
    async with opened(app, authorization="Bearer k1") as one:
        for _ in range(2):
            assert (await one.ask(input="Hi"))["type"] == "response.incomplete"
        refused = await one.ask(input="Hi")
        assert (refused["status"], code_of(refused)) == (429, "rate_limit_exceeded")


# -- a real one ------------------------------------------------------------------------------------


class Client:
    """A WebSocket of wsproto's, which blocks."""

    def __init__(self, address: tuple[str, int], *headers: tuple[bytes, bytes]) -> None:
        self._socket = socket.create_connection(address, timeout=20)
        self._connection = WSConnection(ConnectionType.CLIENT)
        self.send(Request(host=f"{address[0]}:{address[1]}", target=PATH, extra_headers=list(headers)))
        self._events = iter(())

    def send(self, event: Any) -> None:
        self._socket.sendall(self._connection.send(event))

    def next(self) -> Any:
        while (event := next(self._events, None)) is None:
            data = self._socket.recv(65536)
            assert data, "closed"
            self._connection.receive_data(data)
            self._events = iter(list(self._connection.events()))
        return event

    def ask(self, **fields: Any) -> dict[str, Any]:
        """The event that ends the turn."""
        self.send(TextMessage(json.dumps({"type": "response.create", **fields})))
        text = ""
        while True:
            part = self.next()
            assert isinstance(part, TextMessage), part
            text += part.data
            if part.message_finished:
                event: dict[str, Any] = json.loads(text)
                if event["type"] in LAST:
                    return event
                text = ""


def test_a_real_socket(server: RunningServer) -> None:
    client = Client(server.address)
    assert isinstance(client.next(), AcceptConnection)
    asked = {"input": "Where does the newt live?", "max_output_tokens": 8, "temperature": 0}
    over_http = httpx.post(server.url + PATH, json=asked).json()
    found = client.ask(**asked, store=False)["response"]
    assert [item["content"] for item in found["output"]] == [item["content"] for item in over_http["output"]]
    again = client.ask(**asked, previous_response_id=found["id"], store=False)["response"]
    assert again["usage"]["input_tokens"] > found["usage"]["input_tokens"]
    client.send(CloseConnection(code=1000))
    assert isinstance(client.next(), CloseConnection)


def test_a_real_handshake_is_refused_with_the_reason(server: RunningServer) -> None:
    client = Client(server.address, (b"Origin", b"http://evil.example"))
    refused, body = client.next(), client.next()
    assert isinstance(refused, RejectConnection)
    assert isinstance(body, RejectData)
    assert refused.status_code == 403
    assert json.loads(body.data)["error"]["code"] == "cross_origin"


def test_half_a_handshake_is_a_request(server: RunningServer) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert httpx.get(server.url + PATH, headers=upgrade).status_code == 405
    whole = {**upgrade, "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x" * 24}
    assert httpx.get(server.url + "/v1/models", headers=whole).status_code == 200


def test_a_message_over_the_limit_closes_a_real_socket(server: RunningServer) -> None:
    client = Client(server.address)
    assert isinstance(client.next(), AcceptConnection)
    client.send(TextMessage("x" * (1024 * 1024 + 1)))
    closed = client.next()
    assert isinstance(closed, CloseConnection)
    assert closed.code == 1009
