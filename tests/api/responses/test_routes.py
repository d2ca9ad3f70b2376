"""/v1/responses over a fake engine that echoes the prompt, a byte a token."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from litestar import Litestar

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.http.body import parse_fields
from runtime.api.openai import schema
from runtime.responses import ResponseStore
from settings.api import ResponseSettings, ServerSettings
from settings.schema import Settings
from tests.api.conformance import EVENTS, checked_event
from tests.api.fakes import Exchange, FakeService
from tests.api.named_events import events_of
from tests.waiting import until

pytestmark = pytest.mark.anyio
URL = "/v1/responses"
KEYS = ("one", "two")


def asgi_of(service: FakeService, store: ResponseStore | None, settings: Settings | None = None) -> Litestar:
    handle = ServiceHandle(service)  # type: ignore[arg-type]
    handle.responses = store
    return create_app(handle, settings or Settings())


def app_of(service: FakeService, store: ResponseStore | None, settings: Settings | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=asgi_of(service, store, settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.fixture(scope="module", autouse=True)
def _validators() -> None:
    """Builds the validators of events beforehand: pydantic takes longer for it than a test may block the loop."""
    for kind in EVENTS.values():
        kind.model_rebuild()


@pytest.fixture
async def stored(service: FakeService, store: ResponseStore) -> AsyncIterator[httpx.AsyncClient]:
    async with app_of(service, store) as client:
        yield client


async def test_a_whole_response(stored: httpx.AsyncClient) -> None:
    answer = await stored.post(URL, json={"input": "Hi", "max_output_tokens": 4, "metadata": {"a": "b"}})
    body = answer.json()
    assert answer.status_code == 200, body
    assert (body["object"], body["status"], body["model"]) == ("response", "incomplete", "fake")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (body["store"], body["metadata"]) == (True, {"a": "b"})
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": "user", "annotations": [], "logprobs": []}]
    assert body["usage"]["input_tokens"] == 8
    assert body["usage"]["output_tokens"] == 4
    assert (await stored.get(f"{URL}/{body['id']}")).json() == body


async def test_events_join_to_the_whole_response(stored: httpx.AsyncClient) -> None:
    asked = {"input": "Hi", "max_output_tokens": 6, "stream": True}
    events = events_of((await stored.post(URL, json=asked)).text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events if not event["type"].endswith(".delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    final = events[-1]["response"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == final["output"][0]["content"][0]["text"] == "user: "
    assert (await stored.get(f"{URL}/{final['id']}")).json() == final


@pytest.mark.parametrize("asked", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
async def test_log_probabilities(stored: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    asked = {"input": "Hi", "max_output_tokens": 3, **asked}
    answer = await stored.post(URL, json=asked)
    assert answer.status_code == 200, answer.text
    (part,) = answer.json()["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"]] == ["u", "s", "e"]
    assert all(one["logprob"] == -0.5 for one in part["logprobs"])
    assert all(len(one["top_logprobs"]) == asked.get("top_logprobs", 0) for one in part["logprobs"])
    events = events_of((await stored.post(URL, json={**asked, "stream": True})).text)
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [one for found in deltas for one in found] == part["logprobs"]
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["logprobs"] == part["logprobs"]
    assert (await stored.get(f"{URL}/{final['id']}")).json() == final


async def test_a_conversation_goes_on(stored: httpx.AsyncClient, service: FakeService) -> None:
    first = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 4, "instructions": "Be brief."})).json()
    asked = {"input": "More", "previous_response_id": first["id"], "max_output_tokens": 2}
    second = (await stored.post(URL, json=asked)).json()
    assert second["previous_response_id"] == first["id"]
    prompt = bytes(service.submitted[-1].prompt_ids).decode()
    assert prompt.index("user: Hi") < prompt.index("assistant: syst") < prompt.index("user: More")
    assert "Be brief." not in prompt  # instructions are those of one response
    items = (await stored.get(f"{URL}/{second['id']}/input_items", params={"order": "asc"})).json()
    assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"]
    page = await stored.get(f"{URL}/{second['id']}/input_items", params={"limit": 1, "after": items["last_id"]})
    assert page.json()["data"] == [items["data"][1]]
    assert page.json()["has_more"]


async def test_calls_and_their_outputs_stay_in_the_conversation(
    stored: httpx.AsyncClient, service: FakeService
) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "snow"}
    asked = {"input": [{"role": "user", "content": "Hi"}, call, output], "max_output_tokens": 2}
    first = await stored.post(URL, json=asked)
    assert first.status_code == 200, first.text
    assert "snow" in bytes(service.submitted[-1].prompt_ids).decode()
    items = (await stored.get(f"{URL}/{first.json()['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output"]


async def test_a_deleted_response_is_gone(stored: httpx.AsyncClient) -> None:
    id = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 2})).json()["id"]
    deleted = await stored.delete(f"{URL}/{id}")
    assert deleted.json() == {"id": id, "object": "response", "deleted": True}
    for answer in (await stored.get(f"{URL}/{id}"), await stored.delete(f"{URL}/{id}")):
        assert answer.status_code == 404
    more = await stored.post(URL, json={"input": "More", "previous_response_id": id})
    assert (more.status_code, more.json()["error"]["param"]) == (404, "previous_response_id")


async def test_what_is_not_to_be_stored_is_not(stored: httpx.AsyncClient) -> None:
    body = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 2, "store": False})).json()
    assert body["store"] is False
    assert (await stored.get(f"{URL}/{body['id']}")).status_code == 404


async def test_a_server_without_a_store_answers_what_needs_none(service: FakeService) -> None:
    async with app_of(service, None) as client:
        plain = await client.post(URL, json={"input": "Hi", "max_output_tokens": 2})
        assert (plain.status_code, plain.json()["store"]) == (200, False)
        for more in ({"store": True}, {"previous_response_id": "resp_1"}, {"background": True}):
            assert (await client.post(URL, json={"input": "Hi", **more})).status_code == 503


async def test_responses_belong_to_the_key_that_made_them(service: FakeService, store: ResponseStore) -> None:
    settings = Settings(server=ServerSettings(api_key=KEYS))
    one, two = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    async with app_of(service, store, settings) as client:
        made = await client.post(URL, json={"input": "Hi", "max_output_tokens": 2}, headers=one)
        assert made.status_code == 200, made.text
        id = made.json()["id"]
        assert (await client.get(f"{URL}/{id}", headers=one)).status_code == 200
        assert (await client.get(f"{URL}/{id}", headers=two)).status_code == 404


async def test_a_response_in_the_background_is_fetched_later(stored: httpx.AsyncClient) -> None:
    begun = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 4, "background": True})).json()
    assert begun["status"] == "in_progress"
    for _ in range(6000):
        now = (await stored.get(f"{URL}/{begun['id']}")).json()
        if now["status"] != "in_progress":
            break
        await asyncio.sleep(0.01)
    assert now["status"] == "incomplete"
    assert now["output"][0]["content"][0]["text"] == "user"
    assert (await stored.post(f"{URL}/{begun['id']}/cancel")).json() == now


async def test_a_response_in_the_background_is_cancelled(stored: httpx.AsyncClient, service: FakeService) -> None:
    service.stall_after = 1
    begun = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 9, "background": True})).json()
    cancelled = (await stored.post(f"{URL}/{begun['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    assert not service.running


FOLLOWED = {"input": "Hi", "max_output_tokens": 6, "background": True, "stream": True}


async def test_the_events_of_a_response_in_the_background_are_followed_again(stored: httpx.AsyncClient) -> None:
    events = events_of((await stored.post(URL, json=FOLLOWED)).text)
    plain = events_of((await stored.post(URL, json={**FOLLOWED, "background": False})).text)
    assert [event["type"] for event in events] == [event["type"] for event in plain]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = checked_event(json.dumps(events[-1])).response
    assert (final.background, final.status, final.output_text) == (True, "incomplete", "user: ")
    assert (await stored.get(f"{URL}/{final.id}")).json() == events[-1]["response"]
    for after in (None, 0, 3, len(events) - 2, len(events) - 1, len(events) + 5):
        query = {"stream": "true", **({} if after is None else {"starting_after": str(after)})}
        answer = await stored.get(f"{URL}/{final.id}", params=query)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events_of(answer.text) == events[0 if after is None else after + 1 :]
    await stored.delete(f"{URL}/{final.id}")
    assert (await stored.get(f"{URL}/{final.id}", params={"stream": "true"})).status_code == 404


async def test_a_stream_in_the_background_goes_on_without_its_client(
    service: FakeService, store: ResponseStore
) -> None:
    app = asgi_of(service, store)
    service.stall_after = 2
    first = Exchange(app, URL, FOLLOWED)
    await until(lambda: "event: response.output_text.delta" in first.text)
    first.leave()
    await first.task
    assert service.running
    id = json.loads(first.text.partition("data: ")[2].partition("\n")[0])["response"]["id"]
    second = Exchange(app, f"{URL}/{id}", method="GET", query="stream=true&starting_after=3")
    await until(lambda: "event: response.output_text.delta" in second.text)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        cancelled = (await client.post(f"{URL}/{id}/cancel")).json()
        assert (cancelled["status"], service.running) == ("cancelled", {})
        await second.task
        seen = events_of((await client.get(f"{URL}/{id}", params={"stream": "true"})).text)
    assert events_of(second.text) == seen[4:]
    assert (seen[-1]["type"], seen[-1]["response"]) == ("response.cancelled", cancelled)


async def test_a_stream_whose_events_were_dropped_says_so(service: FakeService, store: ResponseStore) -> None:
    app = asgi_of(service, store)
    service.stall_after = 2
    stream = Exchange(app, URL, FOLLOWED)
    await until(lambda: "event: response.output_text.delta" in stream.text)
    app.state.api.event_logs.drop(events_of(stream.text)[0]["response"]["id"])
    await stream.task
    *others, last = events_of(stream.text)
    assert (last["type"], last["code"]) == ("error", "events_dropped")
    assert last["sequence_number"] == len(others)


async def test_a_failed_stream_in_the_background_says_so(stored: httpx.AsyncClient, service: FakeService) -> None:
    service.fail_after = 2
    events = events_of((await stored.post(URL, json=FOLLOWED)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    id = events[-1]["response"]["id"]
    assert events_of((await stored.get(f"{URL}/{id}", params={"stream": "true"})).text) == events


async def test_events_are_kept_as_long_as_there_is_room(service: FakeService, store: ResponseStore) -> None:
    settings = Settings(responses=ResponseSettings(max_events_total=30_000))
    async with app_of(service, store, settings) as client:
        ids = []
        for _ in range(8):
            events = events_of((await client.post(URL, json=FOLLOWED)).text)
            ids.append(events[-1]["response"]["id"])
        answers = [await client.get(f"{URL}/{id}", params={"stream": "true"}) for id in ids]
        kept = [answer.status_code == 200 for answer in answers]
        assert kept == sorted(kept)
        assert 1 <= sum(kept) < 8
        assert (answers[0].status_code, answers[0].json()["error"]["param"]) == (400, "stream")
        assert (await client.get(f"{URL}/{ids[0]}")).json()["status"] == "incomplete"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"user": "u" * 1000}, "user"),
        ({"include": ["weather"]}, "include"),
        ({"background": True, "store": False}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": "maybe"}, "tool_choice"),
        ({"conversation": "c"}, "conversation"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"temperature": -1}, "temperature"),
    ],
)
async def test_what_cannot_be_done_is_named(stored: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await stored.post(URL, json={"input": "Hi", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_sampling_fields_of_a_chat_are_passed_on(stored: httpx.AsyncClient, service: FakeService) -> None:
    await stored.post(URL, json={"input": "Hi", "max_output_tokens": 2, "top_k": 7, "seed": 3, "stop": ["x"]})
    params = service.submitted[-1].params
    assert (params.max_tokens, params.top_k, params.seed, params.stop) == (2, 7, 3, ("x",))


async def test_a_stream_that_fails_ends_with_the_failed_response(
    stored: httpx.AsyncClient, service: FakeService
) -> None:
    service.fail_after = 2
    events = events_of((await stored.post(URL, json={"input": "Hi", "max_output_tokens": 6, "stream": True})).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = checked_event(json.dumps(events[-1])).response
    assert (final.status, final.error.code, final.error.message) == ("failed", "server_error", "It broke.")
    assert checked_event(json.dumps(events[-2])).message == "It broke."
    assert (await stored.get(f"{URL}/{final.id}")).json() == events[-1]["response"]


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("", {"stream": "true"}, "stream"),
        ("", {"starting_after": "3"}, "starting_after"),
        ("", {"stream": "true", "starting_after": "-1"}, "starting_after"),
        ("", {"include": "weather"}, "include"),
        ("", {"colour": "blue"}, "colour"),
        ("/input_items", {"limit": "0"}, "limit"),
        ("/input_items", {"limit": "x"}, "limit"),
        ("/input_items", {"order": "up"}, "order"),
        ("/input_items", {"before": "x"}, "before"),
    ],
)
async def test_parameters_that_a_stored_response_cannot_follow(
    stored: httpx.AsyncClient, path: str, query: dict[str, str], param: str
) -> None:
    id = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 2})).json()["id"]
    answer = await stored.get(f"{URL}/{id}{path}", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    known = {"include[]": "message.output_text.logprobs", **({"stream": "false"} if not path else {})}
    assert (await stored.get(f"{URL}/{id}{path}", params=known)).status_code == 200


async def test_unknown_keys_inside_of_fields_are_named(stored: httpx.AsyncClient) -> None:
    asked = {
        "text": {"colour": "blue"},
        "reasoning": {"depth": 3},
        "tools": [{"type": "function", "name": "f", "x": 1}],
    }
    answer = await stored.post(URL, json={"input": "Hi", "max_output_tokens": 2, "tool_choice": "none", **asked})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-eft-warning"] == "unknown fields: reasoning.depth, text.colour, tools[0].x"


async def test_the_body_is_parsed_once(stored: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat that it becomes is parsed too; it has the input in another form."""
    parsed: list[bytes] = []

    def counted(body: bytes) -> dict[str, Any]:
        parsed.append(body)
        return parse_fields(body)

    monkeypatch.setattr(schema, "parse_fields", counted)
    asked = {"input": "Hi", "max_output_tokens": 2, "top_k": 3}
    assert (await stored.post(URL, json=asked)).status_code == 200
    assert [json.loads(body).keys() >= asked.keys() for body in parsed] == [True, False]


async def test_input_tokens_are_those_of_the_answer(stored: httpx.AsyncClient) -> None:
    first = (await stored.post(URL, json={"input": "Hi", "max_output_tokens": 4})).json()
    for asked in (
        {"input": "Hi"},
        {"input": "Go on", "instructions": "Be brief.", "previous_response_id": first["id"]},
        {"input": [{"role": "user", "content": "Hi"}], "text": {"format": {"type": "text"}}},
    ):
        counted = (await stored.post(f"{URL}/input_tokens", json=asked)).json()
        usage = (await stored.post(URL, json={**asked, "max_output_tokens": 1})).json()["usage"]
        assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


async def test_a_compacted_conversation_goes_on_from_its_summary(
    stored: httpx.AsyncClient, service: FakeService
) -> None:
    service.max_model_len = 2000
    before = [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": "Yes."}]
    answer = await stored.post(f"{URL}/compact", json={"model": "fake", "input": before, "prompt_cache_key": "k"})
    body = answer.json()
    assert answer.status_code == 200, body
    assert body["object"] == "response.compaction"
    prompt = bytes(service.submitted[-1].prompt_ids).decode()
    assert "user: Blue?\nassistant: Yes.\nuser: Summarise our conversation" in prompt
    assert body["usage"]["input_tokens"] == len(prompt)
    (item,) = body["output"]
    assert item["type"] == "compaction"

    after = [item, {"role": "user", "content": "And now?"}]
    await stored.post(URL, json={"input": after, "max_output_tokens": 1})
    prompt_after = bytes(service.submitted[-1].prompt_ids).decode()
    assert prompt_after.startswith("user: Summarise our conversation")
    assert f"\nassistant: {prompt[: body['usage']['output_tokens']]}" in prompt_after
    assert prompt_after.endswith("user: And now?")


async def test_a_request_for_a_summary_joins_the_last_turn_of_the_user(
    stored: httpx.AsyncClient, service: FakeService
) -> None:
    service.max_model_len = 2000
    assert (await stored.post(f"{URL}/compact", json={"model": "fake", "input": "Blue?"})).status_code == 200
    assert bytes(service.submitted[-1].prompt_ids).decode().startswith("user: Blue?\n\nSummarise")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"input": [{"type": "compaction", "encrypted_content": "eft1.no base64"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAAAAB"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "compaction"}]}, "input[0].encrypted_content"),
    ],
)
async def test_what_cannot_be_compacted_is_named(stored: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    asked = {"model": "fake", "input": "Hi", **fields}
    answer = await stored.post(f"{URL}/compact", json={k: v for k, v in asked.items() if v is not None})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "/resp_x", "response_id"),
        ("DELETE", "/resp_x", "response_id"),
        ("POST", "/resp_x/cancel", "response_id"),
        ("GET", "/resp_x/input_items", "response_id"),
    ],
)
async def test_a_missing_response_is_named(stored: httpx.AsyncClient, method: str, path: str, param: str) -> None:
    answer = await stored.request(method, URL + path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, param)
