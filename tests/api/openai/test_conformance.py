"""Answers and events of a real server against the types of the `openai` package, strictly.

Required fields that are missing, values of another type or outside of an enumeration, and fields that neither OpenAI
nor we know fail.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from openai.pagination import SyncCursorPage
from openai.types import (
    Batch,
    Completion,
    CreateEmbeddingResponse,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList

from tests.api.conformance import checked, checked_event
from tests.api.conftest import RunningServer
from tests.api.openai.test_forms import TEMPLATE, TOOLS
from tests.api.state import chat_line, jsonl, stateful_settings, wait_for
from tests.tiny import make_tiny_llama

CHAT, TEXT, RESPONSES, JOBS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/fine_tuning/jobs"
HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("conformance")
    (folder / "template.jinja").write_text(TEMPLATE)
    base = stateful_settings(make_tiny_llama(folder / "tiny", max_position_embeddings=4096), folder / "state")
    chosen = msgspec.structs.replace(
        base,
        model=msgspec.structs.replace(base.model, chat_template=str(folder / "template.jinja")),
        cache=msgspec.structs.replace(base.cache, num_blocks=512),
    )
    with RunningServer(chosen) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def post(http: httpx.Client, url: str, **body: Any) -> str:
    answer = http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.text


def data(stream: str) -> list[str]:
    """The data of a stream's events, without `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    return [line for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 100},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
    ids=["plain", "logprobs", "tools", "thinking"],
)
def test_chats(http: httpx.Client, fields: dict[str, Any]) -> None:
    asked = {"messages": HI, "max_tokens": 5, "seed": 1, **fields}
    checked(ChatCompletion, post(http, CHAT, **asked))
    chunks = [
        checked(ChatCompletionChunk, one)
        for one in data(post(http, CHAT, **asked, stream=True, stream_options={"include_usage": True}))
    ]
    assert chunks[-1].usage is not None


def test_completions(http: httpx.Client) -> None:
    for fields in ({}, {"logprobs": 2}):
        checked(Completion, post(http, TEXT, prompt="Hi", max_tokens=3, **fields))
        for one in data(post(http, TEXT, prompt="Hi", max_tokens=3, stream=True, **fields)):
            # Null until the end, as OpenAI sends it and its type does not have it.
            checked(Completion, one.replace('"finish_reason":null', '"finish_reason":"stop"'))


def test_embeddings_and_models(http: httpx.Client) -> None:
    checked(CreateEmbeddingResponse, post(http, "/v1/embeddings", input=["Hi", "Ho"]))
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    for one in listed["data"]:
        assert checked(Model, json.dumps(one)) == checked(Model, http.get(f"/v1/models/{one['id']}").content)
    checked(ModelDeleted, json.dumps({"id": "a", "object": "model", "deleted": True}))


def test_files_and_batches(http: httpx.Client) -> None:
    def page(kind: Any, url: str) -> None:
        found = http.get(url)
        assert checked(SyncCursorPage[kind], found.content).data
        assert found.json().keys() == {"object", "data", "first_id", "last_id", "has_more"}

    lines = jsonl(chat_line(1), chat_line(2, temperature=-1))
    sent = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("input.jsonl", lines)})
    file = checked(FileObject, sent.content)
    checked(FileObject, http.get(f"/v1/files/{file.id}").content)
    page(FileObject, "/v1/files")
    asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    batch = checked(Batch, post(http, "/v1/batches", **asked))
    done = wait_for(
        lambda: checked(Batch, http.get(f"/v1/batches/{batch.id}").content), lambda one: one.status == "completed"
    )
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 8
    for output in (done.output_file_id, done.error_file_id):
        checked(FileObject, http.get(f"/v1/files/{output}").content)
    page(Batch, "/v1/batches")
    broken = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("input.jsonl", b"{}\n")}).json()["id"]
    failed = checked(Batch, post(http, "/v1/batches", **asked | {"input_file_id": broken}))
    wait_for(
        lambda: checked(Batch, http.get(f"/v1/batches/{failed.id}").content), lambda one: one.errors and one.errors.data
    )
    checked(FileDeleted, http.delete(f"/v1/files/{broken}").content)


def test_fine_tuning(http: httpx.Client) -> None:
    row = {"messages": [*HI, {"role": "assistant", "content": "Ho"}]}
    sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", jsonl(*[row] * 4))})
    model = http.get("/v1/models").json()["data"][0]["id"]
    recipe = {"lora_r": 4, "save_steps": 1, "loss_watchdog_threshold": 100.0}
    asked = {"model": model, "training_file": sent.json()["id"], "hyperparameters": {"n_epochs": 2}, "recipe": recipe}
    job = checked(FineTuningJob, post(http, JOBS, **asked))
    done = wait_for(
        lambda: checked(FineTuningJob, http.get(f"{JOBS}/{job.id}").content), lambda one: one.finished_at is not None
    )
    assert done.status == "succeeded", done.error
    for kind, path in (
        (FineTuningJob, JOBS),
        (FineTuningJobEvent, f"{JOBS}/{job.id}/events"),
        (FineTuningJobCheckpoint, f"{JOBS}/{job.id}/checkpoints"),
    ):
        found = http.get(path)
        assert checked(SyncCursorPage[kind], found.content).data
        assert found.json().keys() == {"object", "data", "first_id", "last_id", "has_more"}
    card = checked(Model, http.get(f"/v1/models/{done.fine_tuned_model}").content)
    assert (card.parent, card.created >= job.created_at) == (model, True)
    assert http.delete(f"/v1/models/{model}").status_code == 409
    deleted = checked(ModelDeleted, http.delete(f"/v1/models/{done.fine_tuned_model}").content)
    assert (deleted.id, deleted.deleted) == (done.fine_tuned_model, True)
    for method in ("GET", "DELETE"):
        gone = http.request(method, f"/v1/models/{done.fine_tuned_model}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"tools": [FUNCTION], "tool_choice": "required", "max_output_tokens": 200, **AT_ONCE},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "get_weather"}, **AT_ONCE},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}}}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"instructions": "Be brief", "metadata": {"a": "b"}, "max_tool_calls": 3, "user": "me", "reasoning": {}},
    ],
    ids=["plain", "logprobs", "tools", "named tool", "form", "thinking", "labels"],
)
def test_responses(http: httpx.Client, fields: dict[str, Any]) -> None:
    asked = {"input": "Hi", "max_output_tokens": 20, "seed": 1, **fields}
    whole = checked(Response, post(http, RESPONSES, **asked))
    assert checked(Response, http.get(f"{RESPONSES}/{whole.id}").content) == whole
    checked(ResponseItemList, http.get(f"{RESPONSES}/{whole.id}/input_items").content)
    events = [checked_event(one) for one in data(post(http, RESPONSES, **asked, stream=True))]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text


def test_a_conversation_with_a_call(http: httpx.Client) -> None:
    tools = {"tools": [FUNCTION], "max_output_tokens": 200, "temperature": 0, "parallel_tool_calls": False, **AT_ONCE}
    first = checked(Response, post(http, RESPONSES, input="Weather?", tool_choice="required", **tools))
    [call] = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "snow"}
    second = checked(Response, post(http, RESPONSES, input=[result], previous_response_id=first.id, **tools))
    listed = http.get(f"{RESPONSES}/{second.id}/input_items", params={"order": "asc"}).content
    kinds = [item.type for item in checked(ResponseItemList, listed).data]
    assert kinds == ["message", *(item.type for item in first.output), "function_call_output"]
    # A client that keeps the history itself gets the same prompt.
    history = [{"role": "user", "content": "Weather?"}, *(item.to_dict() for item in first.output), result]
    same = checked(Response, post(http, RESPONSES, input=history, **tools))
    assert same.usage.input_tokens == second.usage.input_tokens
