"""/v1/batches by the unmodified `openai` client over a real server with a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from settings.api import FileSettings
from tests.api.conftest import RunningServer
from tests.api.state import batch_of, chat_line, ended, jsonl, lines_of, stateful_settings, wait_for


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    files = FileSettings(max_batch_lines=300, batch_concurrency=8)
    with RunningServer(stateful_settings(tiny_model, tmp_path_factory.mktemp("state"), files=files)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def contents(client: openai.OpenAI, file_id: str | None) -> dict[str, str]:
    """Text by custom id."""
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines_of(client, file_id)
    }


def test_a_batch_answers_as_a_request_does(client: openai.OpenAI) -> None:
    lines = [chat_line(number) for number in range(40)]
    batch = batch_of(client, jsonl(*lines), metadata={"project": "newts"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", "/v1/chat/completions")
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = ended(client, batch.id)
    assert done.status == "completed"
    assert done.metadata == {"project": "newts"}
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 40, 0)
    assert done.error_file_id is None
    assert done.errors is None
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"
    found = lines_of(client, done.output_file_id)
    assert len({line["id"] for line in found}) == len({line["response"]["request_id"] for line in found}) == 40
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in found)
    texts = contents(client, done.output_file_id)
    assert texts.keys() == {line["custom_id"] for line in lines}
    for line in lines[::7]:
        online = client.chat.completions.create(model=client.models.list().data[0].id, **line["body"])
        assert texts[line["custom_id"]] == online.choices[0].message.content
        [answer] = [one["response"]["body"] for one in found if one["custom_id"] == line["custom_id"]]
        assert answer.keys() == json.loads(online.to_json()).keys() | {"choices"}
        assert answer["usage"]["total_tokens"] == online.usage.total_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "The newt", "max_tokens": 4}),
        ("/v1/embeddings", {"input": "The newt"}),
        ("/v1/responses", {"input": "The newt", "max_output_tokens": 4}),
    ],
)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "one", "method": "POST", "url": endpoint, "body": body}
    done = ended(client, batch_of(client, jsonl(line), endpoint=endpoint).id)
    assert done.status == "completed"
    [answer] = lines_of(client, done.output_file_id)
    usage = answer["response"]["body"]["usage"]
    assert usage.get("prompt_tokens", usage.get("input_tokens")) == done.usage.input_tokens > 0
    assert usage["total_tokens"] == done.usage.total_tokens
    assert done.usage.output_tokens == (0 if endpoint == "/v1/embeddings" else 4)


def test_answers_that_are_errors_go_to_the_error_file(client: openai.OpenAI) -> None:
    lines = [chat_line(0), chat_line(1, model="gpt-7"), chat_line(2, temperature=-1), chat_line(3, messages="x")]
    done = ended(client, batch_of(client, jsonl(*lines)).id)
    assert done.status == "completed"
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 3)
    assert [line["custom_id"] for line in lines_of(client, done.output_file_id)] == ["line-0"]
    errors = {line["custom_id"]: line["response"] for line in lines_of(client, done.error_file_id)}
    assert {name: response["status_code"] for name, response in errors.items()} == {
        "line-1": 404,
        "line-2": 400,
        "line-3": 400,
    }
    assert errors["line-2"]["body"]["error"]["param"] == "temperature"


def test_bad_lines_fail_the_batch_by_number(client: openai.OpenAI) -> None:
    good = chat_line(1)
    bad: list[tuple[Any, str]] = [
        (b"not json", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        ([1, 2], "invalid_line"),
        ({**good, "custom_id": ""}, "invalid_custom_id"),
        ({**good, "custom_id": 7}, "invalid_line"),
        (good, "duplicate_custom_id"),
        ({**good, "custom_id": "a", "method": "GET"}, "invalid_method"),
        ({**good, "custom_id": "b", "url": "/v1/completions"}, "invalid_url"),
        ({**good, "custom_id": "c", "url": "/admin/train"}, "invalid_url"),
        ({**good, "custom_id": "d", "body": "text"}, "invalid_body"),
        ({**good, "custom_id": "e", "body": {**good["body"], "stream": True}}, "unsupported_parameter"),
        ({**good, "custom_id": "h", "body": {"input": "Hi", "background": True}}, "unsupported_parameter"),
        ({**good, "custom_id": "f", "colour": "blue"}, "invalid_line"),
        ({"custom_id": "g"}, "invalid_line"),
        (b'{"body": ' + b"[" * 100_000, "invalid_json_line"),
    ]
    done = ended(client, batch_of(client, jsonl(good, b"", *(line for line, _ in bad))).id)
    assert done.status == "failed"
    assert done.failed_at is not None
    expected = [(number, code) for number, (_, code) in enumerate(bad, 3)]  # one good line, one blank one
    assert [(error.line, error.code) for error in done.errors.data] == expected
    assert all(error.message for error in done.errors.data)
    written = [line["error"] for line in lines_of(client, done.error_file_id)]
    assert [(error["line"], error["code"]) for error in written] == expected
    assert done.output_file_id is None


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\n\n", "empty_file"), (jsonl(*(chat_line(number) for number in range(301))), "too_many_requests")],
)
def test_files_that_are_no_batch(client: openai.OpenAI, content: bytes, code: str) -> None:
    done = ended(client, batch_of(client, content).id)
    assert (done.status, done.errors.data[-1].code) == ("failed", code)


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"key": "x" * 600}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"input_file_id": 5}, "input_file_id"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, changed: dict[str, Any], param: str) -> None:
    asked = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h", **changed}
    answer = httpx.post(f"{client.base_url}batches", json=asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_unknown_ids_and_files_of_another_purpose(client: openai.OpenAI) -> None:
    for ask in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as missing:
            ask("batch_nothing")
        assert missing.value.code == "batch_not_found"
    asked: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    with pytest.raises(openai.NotFoundError) as no_file:
        client.batches.create(input_file_id="file-nothing", **asked)
    assert no_file.value.param == "input_file_id"
    other = client.files.create(file=("a.jsonl", jsonl(chat_line(1))), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as purpose:
        client.batches.create(input_file_id=other.id, **asked)
    assert "fine-tune" in purpose.value.message


def test_cancelling_keeps_what_is_answered(client: openai.OpenAI) -> None:
    lines = [chat_line(number, max_tokens=2 + 100 * (number > 20), ignore_eos=True) for number in range(200)]
    batch = batch_of(client, jsonl(*lines))
    wait_for(lambda: client.batches.retrieve(batch.id), lambda now: now.request_counts.completed >= 10)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelling_at <= done.cancelled_at
    found = [line["custom_id"] for line in lines_of(client, done.output_file_id)]
    assert 10 <= len(found) == len(set(found)) == done.request_counts.completed < 200
    with pytest.raises(openai.ConflictError) as again:
        client.batches.cancel(batch.id)
    assert again.value.code == "batch_state"


def test_expiry_writes_an_error_for_each_line_that_is_left(client: openai.OpenAI) -> None:
    lines = [chat_line(number, max_tokens=400, ignore_eos=True) for number in range(200)]
    done = ended(client, batch_of(client, jsonl(*lines), completion_window="1s").id)
    assert done.status == "expired"
    answered = [line["custom_id"] for line in lines_of(client, done.output_file_id)]
    expired = lines_of(client, done.error_file_id)
    assert {line["error"]["code"] for line in expired} == {"batch_expired"}
    assert sorted([*answered, *(line["custom_id"] for line in expired)]) == sorted(line["custom_id"] for line in lines)
    assert done.request_counts.failed == len(expired)


def test_lists_are_pages(client: openai.OpenAI) -> None:
    made = [ended(client, batch_of(client, jsonl(chat_line(number, max_tokens=1))).id).id for number in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert listed[:3] == made[::-1]
    assert [batch.id for batch in client.batches.list(after=made[2], limit=1).data] == [made[1]]


def test_live_requests_go_first(client: openai.OpenAI, server: RunningServer) -> None:
    """A request that comes while a batch runs is done before the batch."""
    lines = [chat_line(number, max_tokens=100, ignore_eos=True) for number in range(120)]
    batch = batch_of(client, jsonl(*lines))
    wait_for(lambda: client.batches.retrieve(batch.id), lambda now: now.request_counts.completed >= 1)
    name = client.models.list().data[0].id
    answer = client.completions.create(model=name, prompt="The newt", max_tokens=20, temperature=0)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)
    assert ended(client, batch.id).status == "cancelled"
    alone = client.completions.create(model=name, prompt="The newt", max_tokens=20, temperature=0)
    assert answer.choices[0].text == alone.choices[0].text
    wait_for(lambda: httpx.get(f"{server.url}/load").json(), lambda load: load["server_load"] == 0)
