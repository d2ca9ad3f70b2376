"""Parsers of tool calls: what each format's own examples give, and that pieces and malformed text lose nothing."""

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.tool_calls import FORMATS, CallDelta, Event, Tool, detect_format

TOOLS = [
    Tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    Tool("now", {"type": "object", "properties": {}}),
]

WEATHER = {"city": 'Par"is {x} ü', "days": 3}


def run(name: str, pieces: Sequence[str]) -> list[Event]:
    parser = FORMATS[name].parser(TOOLS)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def joined(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call. Deltas must come in order."""
    content, calls = "", []
    for event in events:
        if isinstance(event, str):
            content += event
        elif event.name is not None:
            assert event.index == len(calls)
            calls.append((event.name, event.arguments))
        else:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    return content, calls


def parsed(name: str, text: str) -> tuple[str, list[tuple[str, object]]]:
    content, calls = joined(run(name, [text]))
    return content, [(called, json.loads(arguments)) for called, arguments in calls]


W = json.dumps({"name": "get_weather", "arguments": WEATHER})
N = '{"name": "now", "arguments": {}}'
LW, LN = W.replace("arguments", "parameters"), N.replace("arguments", "parameters")
XML = (
    '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"is {x} ü\n</parameter>\n<parameter=days>\n3\n'
    "</parameter>\n</function>\n</tool_call>"
)
TWO = {
    "hermes": f"<tool_call>\n{W}\n</tool_call>\n<tool_call>\n{N}\n</tool_call>",
    "mistral": f"[TOOL_CALLS] [{W}, {N}]",
    "mistral_args": f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(WEATHER)}[TOOL_CALLS]now[ARGS]{{}}",
    "granite": f"<|tool_call|>[{W}, {N}]",
    "phi4": f"<|tool_call|>[{W},{N}]<|/tool_call|>",
    "llama3_json": f"{LW}; {LN}",
    "pythonic": """[get_weather(city='Par"is {x} ü', days=3), now()]""",
    "qwen3_coder": f"{XML}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}
"""Format → its text of two calls, of WEATHER and of no arguments."""


def test_every_format_is_here() -> None:
    assert TWO.keys() == {one.name for one in FORMATS.values()}


@pytest.mark.parametrize("name", TWO)
def test_two_calls(name: str) -> None:
    assert parsed(name, TWO[name]) == ("", [("get_weather", WEATHER), ("now", {})])


@pytest.mark.parametrize("name", sorted(TWO.keys() - {"llama3_json", "pythonic"}))
def test_content_before_calls_stays_and_whitespace_between_goes(name: str) -> None:
    content, calls = parsed(name, f"Let me see.\n\n{TWO[name]}\n")
    assert content == "Let me see."
    assert [called for called, _ in calls] == ["get_weather", "now"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", f"<|python_tag|>{LW}"),
        ("llama3_json", f" \n{LW}"),
        ("pythonic", f"<|python_start|>{TWO['pythonic']}<|python_end|>"),
        ("pythonic", """[get_weather(city="Par\\"is {x} ü", days=3)]"""),
        ("mistral", f"[TOOL_CALLS]get_weather{json.dumps(WEATHER)}"),
        ("phi4", f"functools[{W}]"),
        ("granite", f"<tool_call>[{W}]"),
        ("hermes", f"<tool_call>{W}"),
        ("hermes", f'<tool_call>{{"arguments": {json.dumps(WEATHER)}, "name": "get_weather"}}</tool_call>'),
        ("hermes", f'<tool_call>{{"name":"get_weather","id":7,"arguments":{json.dumps(json.dumps(WEATHER))}}}'),
        ("qwen3_coder", XML.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")),
    ],
)
def test_variants(name: str, text: str) -> None:
    content, calls = parsed(name, text)
    assert content == ""
    assert calls[0] == ("get_weather", WEATHER)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": nope}</tool_call>'),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call> I do not know </tool_call> <tool_"),
        ("hermes", '<tool_call>{"arguments": {"city": "x"}}</tool_call>'),
        ("hermes", "<tool_call>"),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", '[TOOL_CALLS] [{"name": "unknown"}]'),
        ("mistral_args", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("mistral_args", "[TOOL_CALLS]now[ARGS] 3"),
        ("granite", "<|tool_call|>[]"),
        ("phi4", "functools(3) <|tool_call|>{}"),
        ("llama3_json", '{"answer": 42}'),
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", 'Use {"name": "now", "parameters": {}}.'),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[get_weather(city=open('x'))]"),
        ("pythonic", "[get_weather('Paris')] "),
        ("pythonic", "[get_weather(city='a'"),
        ("pythonic", "See [now()]"),
        ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call> a <function="),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert joined(run(name, [text])) == (text, [])


@pytest.mark.parametrize("name", sorted(TWO.keys() - {"pythonic", "qwen3_coder"}))
def test_arguments_come_while_they_are_written(name: str) -> None:
    parser = FORMATS[name].parser(TOOLS)
    text = TWO[name]
    middle = text.index("{x}")
    _, calls = joined(parser.feed(text[:middle]))
    assert calls == [("get_weather", text[text.index('{"city"') : middle])]


def test_what_follows_broken_arguments_is_content() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": oops}}</tool_call> done'
    assert joined(run("hermes", [text])) == ("oops}}</tool_call> done", [("get_weather", '{"city": ')])


FRAGMENTS = sorted(
    {
        *re.findall(r"<[^>]*>|\w+|\[\w+\]|\s+|.", "".join(TWO.values())),
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "functools", "\\", "\\u00e9", "ü", W,
        LW, N, XML, "[now()]", "[", "; ", '{"name": ', "null", "-1.5e3",
    }
)  # fmt: skip


@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(sorted(TWO)))
def test_any_split_gives_the_same_and_nothing_is_lost(data: st.DataObject, name: str) -> None:
    some = st.lists(st.sampled_from([*FRAGMENTS, TWO[name], TWO[name]]), max_size=12)
    text = "".join(data.draw(some))
    whole = joined(run(name, [text]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(run(name, pieces)) == whole
    assert joined(run(name, list(text))) == whole
    content, calls = whole
    if not calls:
        assert content == text
    kept = iter(text)
    assert all(char in kept for char in content), "content is a subsequence of the text"


TEMPLATES = {
    "hermes": "return a json object within <tool_call></tool_call> XML tags",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "mistral_args": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "granite": "<|tool_call|> tools",
    "phi4": "<|tool_call|> and <|/tool_call|>",
    "llama3_json": 'Respond in the format {"name": function name, "parameters": dictionary}',
    "pythonic": "[func_name1(params_name1=params_value1)]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_told_from_templates(name: str) -> None:
    found = detect_format(TEMPLATES[name])
    assert found is not None
    assert found.name == name


def test_a_template_without_tools_has_no_format() -> None:
    assert detect_format("{{ messages }}") is None
    assert detect_format(None) is None


def test_a_call_delta_names_the_function_once() -> None:
    events = run("hermes", list(TWO["hermes"]))
    names = [event.name for event in events if isinstance(event, CallDelta) and event.name]
    assert names == ["get_weather", "now"]


PRETTY = json.dumps({"name": "get_weather", "arguments": WEATHER}, indent=2)


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@pytest.mark.parametrize("call", [W, PRETTY, LW, W.replace("{", '{"type": "function", ', 1)])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("\n", "\n"), ("```json\n", "\n```"), ("```\n", "```\n")])
def test_a_call_without_tags(name: str, call: str, before: str, after: str) -> None:
    text = f"{before}{call}{after}"
    assert parsed(name, text) == ("", [("get_weather", WEATHER)])
    assert parsed(name, f"{text}\n{text}") == ("", [("get_weather", WEATHER)] * 2)
    assert joined(run(name, list(text))) == joined(run(name, [text]))
    assert parsed(name, f"{text}\nIt is done.")[0].strip() == "It is done."


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "other", "arguments": {"city": "Paris"}}',
        '{"name": "now"}',
        '{"name": "now", "age": 3, "arguments": {}}',
        '{"name": "now", "arguments": "none"}',
        '{"arguments": {}, "name": "now"}',
        '```python\n{"name": "now", "arguments": {}}\n```',
        '```json{"name": "now", "arguments": {}}\n```',
        '```json\n{"names": ["now"]}\n```',
        f"Call it so:\n```json\n{N}\n```",
        "``` json\n",
        "```",
        "``",
        '{"name',
    ],
)
@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_what_only_looks_like_a_call_is_content(name: str, text: str) -> None:
    assert parsed(name, text) == (text, [])


def test_beside_a_form_that_was_asked_for_only_calls_of_hermes_with_tags_are_calls() -> None:
    form = FORMATS["hermes"]
    for text, expected in ((N, (N, [])), (TWO["hermes"], parsed("hermes", TWO["hermes"]))):
        parser = form.parser_beside_form(TOOLS)
        content, calls = joined([*parser.feed(text), *parser.finish()])
        assert (content, [(name, json.loads(arguments)) for name, arguments in calls]) == expected
