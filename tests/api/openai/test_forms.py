"""Structured output, tools and reasoning over a tiny model behind a real server.

The model's weights are random, so what it says is nonsense; that it is valid, and that a stream says the same as a
whole answer, does not depend on that.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import msgspec
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from settings.api import ServerSettings
from settings.schema import ModelSettings, Settings
from tests.api.conftest import RunningServer, jobs_of, tiny_settings
from tests.api.fakes import events
from tests.tiny import make_tiny_llama
from tests.trainer.jobs.fakes import World

TEMPLATE = """{%- if tools %}<|im_start|>system
Call with <tool_call></tool_call>:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% elif enable_thinking is defined %}<think>

</think>

{% endif %}{% endif %}"""

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object"}}
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("forms")
    model = make_tiny_llama(folder / "tiny", max_position_embeddings=4096)
    (folder / "template.jinja").write_text(TEMPLATE)
    base = tiny_settings(model)
    chosen = msgspec.structs.replace(
        base,
        model=msgspec.structs.replace(base.model, chat_template=str(folder / "template.jinja")),
        cache=msgspec.structs.replace(base.cache, num_blocks=512),
    )
    state = jobs_of(World(folder / "state"))
    with RunningServer(chosen, state) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def bare(tiny_model: Path) -> Iterator[httpx.Client]:
    """A model whose template knows nothing of tools."""
    with RunningServer(tiny_settings(tiny_model)) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def demo() -> Iterator[httpx.Client]:
    chosen = Settings(model=ModelSettings(model="demo", threads=1), server=ServerSettings(port=0))
    with RunningServer(chosen) as server, httpx.Client(base_url=server.url, timeout=240) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 200, "seed": 1, **fields}


def ask(client: httpx.Client, url: str = CHAT, **body: Any) -> dict[str, Any]:
    answer = client.post(url, json=body)
    assert answer.status_code == 200, f"{answer.text} {json.dumps(body)}"
    found: dict[str, Any] = answer.json()
    return found


def refused(client: httpx.Client, url: str = CHAT, **body: Any) -> tuple[str, str]:
    answer = client.post(url, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"], answer.json()["error"]["message"]


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    return [(name, json.loads(arguments)) for name, arguments in found]


# -- structured output -----------------------------------------------------------------------------


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}}, ANSWER),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": ANSWER, "strict": True}}}, ANSWER),
        ({"structured_outputs": {"json": ANSWER}}, ANSWER),
        ({"structured_outputs": {"json": json.dumps(ANSWER)}}, ANSWER),
        ({"guided_json": ANSWER}, ANSWER),
        ({"guided_regex": r'"[a-z]{3}"'}, {"type": "string", "pattern": "^[a-z]{3}$"}),
        ({"structured_outputs": {"regex": "[1-9][0-9]{2}"}}, {"type": "integer", "minimum": 0, "maximum": 999}),
        ({"guided_choice": ["7", "true"]}, {"enum": [7, True]}),
        ({"structured_outputs": {"choice": ["null"]}}, {"const": None}),
        ({"guided_grammar": 'root ::= "1" "2"*'}, {"type": "integer"}),
        ({"structured_outputs": {"grammar": 'start: "[" "1"? "]"'}}, {"type": "array"}),
    ],
)
def test_structured_outputs_are_valid(client: httpx.Client, url: str, fields: Any, schema: Any) -> None:
    for temperature in (0, 1):
        body = chat(temperature=temperature, n=1 + temperature, **fields)
        if url == COMPLETIONS:
            body["prompt"] = body.pop("messages")[0]["content"]
        for choice in ask(client, url, **body)["choices"]:
            text = choice["message"]["content"] if url == CHAT else choice["text"]
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(text), schema)
            else:
                assert "1222" in text, "the only one that may not come to an end"


def test_json_object_is_an_object(client: httpx.Client) -> None:
    body = chat(response_format={"type": "json_object"}, max_tokens=3000, temperature=1.5)
    (choice,) = ask(client, **body)["choices"]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_structural_tags(client: httpx.Client) -> None:
    tag = {"begin": "<f=now>", "schema": {"const": 7}, "end": "</f>"}
    body = {"type": "structural_tag", "structures": [tag], "triggers": ["<f="]}
    for fields in ({"response_format": body}, {"structured_outputs": {"structural_tag": json.dumps(body)}}):
        text = ask(client, **chat(**fields, max_tokens=40))["choices"][0]["message"]["content"]
        assert "<f=" not in text or "<f=now>7</f>"[: len(text) - text.index("<f=")] in text
    assert refused(client, **chat(response_format={**body, "triggers": ["<g="]}))[0] == "response_format"
    for more in ({"format": {"type": "triggered_tags", "triggers": ["<f="], "tags": []}}, {**body, "format": {}}):
        tag = {"type": "structural_tag", **more}
        assert "response_format.format" in refused(client, **chat(response_format=tag))[1]
        found = refused(client, **chat(structured_outputs={"structural_tag": json.dumps(tag)}))
        assert found[0] == "structured_outputs.structural_tag"
        assert ".format" in found[1]


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"response_format": {"type": "stsring"}}, "response_format", "stsring"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"guided_regex": "[.*"}, "guided_regex", "regex"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": [1]}, "guided_json", "object"),
        ({"guided_json": "{"}, "guided_json", "JSON schema"),
        ({"guided_choice": []}, "guided_choice", "at least|between 1"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "grammar"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "one form only"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one form only"),
        ({"guided_json": {"$ref": "http://127.0.0.1:9/x"}}, "guided_json", "127.0.0.1:9"),
        ({"guided_choice": ["x" * 600_000]}, "guided_choice", "524288"),
        ({"guided_regex": "a", "use_beam_search": True, "n": 2}, "guided_regex", "beam"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "grammar"),
        ({"tools": TOOLS, "bad_words": ["a"]}, "bad_words", "tools"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", "`no`"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "get_weather"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "a b"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
            "tools",
            "not",
        ),
        ({"tools": TOOLS * 65}, "tools", "128"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "-1"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "much"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "bool"),
    ],
)
def test_bad_input_is_refused_by_name(client: httpx.Client, fields: Any, param: str, named: str) -> None:
    found, message = refused(client, **chat(**fields))
    assert found == param
    assert any(one in message for one in named.split("|")), message


def test_the_next_request_is_answered_after_all_that(client: httpx.Client) -> None:
    body = chat(guided_regex="[a-z]{5}")
    assert ask(client, **body)["choices"] == ask(client, **body)["choices"]


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls_are_valid(client: httpx.Client, choice: Any, parallel: bool) -> None:
    body = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, n=4, temperature=1.5)
    for one in ask(client, **body)["choices"]:
        calls = calls_of(one["message"]) if one["finish_reason"] == "tool_calls" else []
        assert one["finish_reason"] in ("tool_calls", "length")
        assert one["finish_reason"] == "length" or calls
        assert parallel or len(calls) <= 1
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
            assert isinstance(choice, str) or name == "get_weather"
        if calls:
            assert one["message"]["content"] is None
            ids = [call["id"] for call in one["message"]["tool_calls"]]
            assert len(set(ids)) == len(ids)


def test_a_stored_stream_has_the_calls_that_were_sent(client: httpx.Client) -> None:
    body = chat(tools=TOOLS, tool_choice="required", n=3, temperature=1.5, store=True)
    chunks = list(events(client.post(CHAT, json={**body, "stream": True}).text))
    sent = [
        (choice["index"], call["index"], call["id"], call["function"]["name"])
        for chunk in chunks
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls", ())
        if "id" in call
    ]
    stored = client.get(f"{CHAT}/{chunks[0]['id']}").json()
    kept = [
        (choice["index"], number, call["id"], call["function"]["name"])
        for choice in stored["choices"]
        for number, call in enumerate(choice["message"].get("tool_calls", ()))
    ]
    assert sorted(sent) == kept != []
    assert stored["choices"] != ask(client, **body)["choices"]  # whose calls have ids of their own


def test_no_call_where_none_is_allowed(client: httpx.Client) -> None:
    plain = ask(client, **chat(temperature=1))
    none = ask(client, **chat(temperature=1, tools=TOOLS, tool_choice="none"))
    assert none["choices"] == plain["choices"]
    assert none["usage"] == plain["usage"]


def test_a_begun_call_is_held_to_its_schema(client: httpx.Client) -> None:
    """The answer begins with what the client has begun: a call."""
    for seed in range(4):
        begun = 'Well, <tool_call>\n{"name": "get_w'
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": begun}]
        body = chat(messages=messages, tools=TOOLS, tool_choice="auto", seed=seed, temperature=1)
        answer = ask(client, **body, continue_final_message=True)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_calls_in_the_history_reach_the_template(client: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    with_call = ask(client, **chat(messages=messages, max_tokens=1))["usage"]["prompt_tokens"]
    written = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
    messages[1] = {"role": "assistant", "content": written}
    assert ask(client, **chat(messages=messages, max_tokens=1))["usage"]["prompt_tokens"] == with_call
    call["function"] = {"name": "now", "arguments": "[1]"}
    messages[1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert refused(client, **chat(messages=messages))[0] == "messages[1].tool_calls[0].function.arguments"


def test_tokenize_counts_tools_as_a_chat_does(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    counted = ask(client, "/tokenize", messages=messages, tools=TOOLS)["count"]
    assert counted > ask(client, "/tokenize", messages=messages)["count"] + 50
    assert counted == ask(client, **chat(messages=messages, tools=TOOLS, max_tokens=1))["usage"]["prompt_tokens"]
    bad = [{"type": "function", "function": {"name": "a b"}}]
    assert refused(client, "/tokenize", messages=messages, tools=bad)[0] == "tools[0].function.name"


def test_a_template_without_tools_has_them_in_the_system_message(bare: httpx.Client) -> None:
    plain = ask(bare, **chat(max_tokens=1))["usage"]["prompt_tokens"]
    body = chat(tools=TOOLS[1:], tool_choice="required", max_tokens=60, temperature=0)
    answer = ask(bare, **body)
    assert answer["usage"]["prompt_tokens"] > plain + 50
    assert calls_of(answer["choices"][0]["message"])[0][0] == "now"


# -- reasoning -------------------------------------------------------------------------------------


def test_the_budget_ends_reasoning(client: httpx.Client) -> None:
    body = chat(
        chat_template_kwargs={"enable_thinking": True}, thinking_token_budget=12, guided_regex="[a-z]{3}", temperature=1
    )
    answer = ask(client, **body, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"]
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"]
    assert len(choice["message"]["content"]) == 3
    details = answer["usage"]["completion_tokens_details"]
    assert 12 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"] <= len(choice["token_ids"])
    hidden = ask(client, **body, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in hidden
    assert hidden["content"] == choice["message"]["content"]


def test_effort_turns_reasoning_on_and_off(client: httpx.Client) -> None:
    body = chat(thinking_token_budget=8, guided_regex="[a-z]{3}", temperature=1)
    assert ask(client, **body, reasoning_effort="high")["choices"][0]["message"]["reasoning_content"]
    assert ask(client, **body, reasoning_effort="none")["choices"][0]["message"]["reasoning_content"] is None


def test_a_model_that_does_not_reason_says_so(bare: httpx.Client) -> None:
    assert refused(bare, **chat(thinking_token_budget=5))[0] == "thinking_token_budget"
    assert refused(bare, **chat(reasoning_effort="high"))[0] == "reasoning_effort"


# -- streams ---------------------------------------------------------------------------------------


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The choices of a stream, joined to what a whole answer has, and the usage."""
    text = client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in events(text):
        usage = chunk["usage"] or usage
        for one in chunk["choices"]:
            choice = choices.setdefault(one["index"], {"content": "", "reasoning": "", "calls": [], "ids": set()})
            delta = one["delta"]
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(choice["calls"])
                    choice["calls"].append([call["function"]["name"], ""])
                    choice["ids"].add(call["id"])
                choice["calls"][call["index"]][1] += call["function"]["arguments"]
            if one["finish_reason"]:
                assert delta == {}
                choice["finish"] = one["finish_reason"], one["stop_reason"]
    assert all(len(choice["ids"]) == len(choice["calls"]) for choice in choices.values())
    return [choices[index] for index in sorted(choices)], usage


FORMATS = st.sampled_from(
    [
        {},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}},
        {"guided_regex": "[a-z<>/]{3,30}"},
        {"guided_choice": ["yes", "no, never"]},
    ]
)
CHOICES = st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "now"}}])


@hypothesis_settings(max_examples=60)
@given(
    form=FORMATS,
    tools=st.none() | CHOICES,
    parallel=st.booleans(),
    thinking=st.sampled_from([None, True, False]),
    budget=st.none() | st.integers(0, 20),
    shown=st.booleans(),
    n=st.integers(1, 3),
    stop=st.sampled_from([[], ["a"], ["ci", "}"], ["</think>"]]),
    most=st.integers(1, 120),
    least=st.integers(0, 5),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0, 1, 2]),
)
def test_streams_and_whole_answers_are_the_same(
    client: httpx.Client,
    form: dict[str, Any],
    tools: Any,
    parallel: bool,
    thinking: bool | None,
    budget: int | None,
    shown: bool,
    n: int,
    stop: list[str],
    most: int,
    least: int,
    seed: int,
    temperature: int,
) -> None:
    body = chat(**form, n=n, stop=stop, max_tokens=most, seed=seed, temperature=temperature)
    body |= {"min_tokens": min(least, most), "include_reasoning": shown}
    if tools is not None:
        body |= {"tools": TOOLS, "tool_choice": tools, "parallel_tool_calls": parallel}
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    if budget is not None:
        body["thinking_token_budget"] = budget
    whole = ask(client, **body)
    choices, usage = streamed(client, body)
    cached = usage.pop("prompt_tokens_details"), whole["usage"].pop("prompt_tokens_details")
    assert all(details["cached_tokens"] >= 0 for details in cached)
    assert usage == whole["usage"]
    assert len(choices) == n
    for one, got in zip(whole["choices"], choices, strict=True):
        message = one["message"]
        assert got["content"] == (message["content"] or "")
        assert got["reasoning"] == (message.get("reasoning_content") or "")
        assert got["calls"] == [list(call["function"].values()) for call in message.get("tool_calls", [])]
        assert got["finish"] == (one["finish_reason"], one["stop_reason"])
        for name, arguments in calls_of(message) if one["finish_reason"] == "tool_calls" and not stop else []:
            jsonschema.validate(arguments, SCHEMAS[name])


# -- clients ---------------------------------------------------------------------------------------


def test_the_openai_client_parses_and_calls(client: httpx.Client) -> None:
    class Answer(pydantic.BaseModel):
        ok: bool
        count: Annotated[int, pydantic.Field(ge=0, le=99)]

    class GetWeather(pydantic.BaseModel):
        city: Literal["Paris", "Oslo"]
        days: Annotated[int, pydantic.Field(ge=0, le=9)]

    ours = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    name = ours.models.list().data[0].id
    ask: Any = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "seed": 3}
    parsed = ours.chat.completions.parse(**ask, response_format=Answer, temperature=0).choices[0].message.parsed
    assert isinstance(parsed, Answer)
    tool = openai.pydantic_function_tool(GetWeather)
    with ours.chat.completions.stream(**ask, tools=[tool], tool_choice="required", parallel_tool_calls=False) as stream:
        kinds = {event.type for event in stream}
        call = stream.get_final_completion().choices[0].message.tool_calls[0].function  # type: ignore[index]
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(call.parsed_arguments, GetWeather)


@pytest.mark.real_model
def test_smollm_calls_a_tool_with_valid_arguments(demo: httpx.Client) -> None:
    messages = [{"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}]
    for temperature in (0, 1):
        body = chat(messages=messages, tools=TOOLS[:1], tool_choice="required", temperature=temperature)
        (choice,) = ask(demo, **body, parallel_tool_calls=False)["choices"]
        assert choice["finish_reason"] == "tool_calls"
        ((name, arguments),) = calls_of(choice["message"])
        assert name == "get_weather"
        jsonschema.validate(arguments, WEATHER)
        result = {"role": "tool", "tool_call_id": choice["message"]["tool_calls"][0]["id"], "content": "Rain."}
        again = ask(demo, **chat(messages=[*messages, choice["message"], result], tools=TOOLS[:1], max_tokens=30))
        assert again["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
