"""Grammars of tool calls and of reasoning: random answers parse, and their arguments are valid."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import Unsupported
from runtime.text.grammar import GrammarBuilder, GrammarCompiler, GrammarFailed, ThinkingBudget, json_part
from runtime.text.grammar.source import pattern_of
from runtime.text.reasoning import REASONING_FORMATS, ReasoningParser
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import FORMATS, CallDelta, Tool
from tests.text.grammar.walks import allowed, walk

TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
                "unit": {"$ref": "#/$defs/unit"},
                "at": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            },
            "required": ["days"],
            "additionalProperties": False,
            "$defs": {"unit": {"const": {"scale": "C"}}},
        },
    ),
    Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
NAMES = sorted({one.name for one in FORMATS.values()})


def grammar_of(compiler: GrammarCompiler, name: str, *, forced: bool, parallel: bool, tools: list[Tool] = TOOLS) -> str:
    builder, form = GrammarBuilder(compiler.special_id), FORMATS[name]
    rules = form.calls if forced else form.answer
    return builder.build(rules(builder, tools, parallel=parallel))


def parse(name: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    parser = FORMATS[name].parser(TOOLS)
    content, calls = "", []
    for event in parser.feed(text) + parser.finish():
        if isinstance(event, CallDelta):
            calls += [[event.name, ""]] if event.name else []
            calls[event.index][1] += event.arguments
        else:
            content += event
    return content, [(called, json.loads(arguments)) for called, arguments in calls]


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**32), parallel=st.booleans(), special=st.booleans())
def test_forced_calls_parse_and_are_valid(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    name: str,
    seed: int,
    parallel: bool,
    special: bool,
) -> None:
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    ids, finished = walk(compiler, tokenizer, grammar_of(compiler, name, forced=True, parallel=parallel), seed)
    if not finished:
        return
    content, calls = parse(name, tokenizer.decode(ids, skip_special_tokens=False))
    assert content == ""
    assert calls
    assert parallel or len(calls) == 1
    for called, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[called])


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "mistral_args"])
@pytest.mark.parametrize("forced", [True, False])
def test_an_answer_may_end_after_whitespace(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, name: str, forced: bool
) -> None:
    """Whitespace is what may lead to a further call; a model that wants none must not be forced into one by it."""
    call = {
        "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "qwen3_coder": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "mistral_args": "[TOOL_CALLS]now[ARGS]{}",
    }[name]
    state = special_compiler.compile(grammar_of(special_compiler, name, forced=forced, parallel=True)).start()
    state.follow(special_tokenizer.encode(f"{call}\n"))
    assert special_tokenizer.eos_ids[0] in allowed(state, special_tokenizer.vocab_size)
    assert parse(name, f"{call}\n") == ("", [("now", {})])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_the_end_of_a_call_of_hermes_may_be_left_out(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, forced: bool, parallel: bool
) -> None:
    begin = '<tool_call>\n{"name": "now", "arguments": {}}'
    state = special_compiler.compile(grammar_of(special_compiler, "hermes", forced=forced, parallel=parallel)).start()
    state.follow(special_tokenizer.encode(begin))
    assert special_tokenizer.eos_ids[0] in allowed(state, special_tokenizer.vocab_size)
    assert parse("hermes", begin) == ("", [("now", {})])


@pytest.mark.parametrize("between", ["", "\n", " \n  \n"])
@pytest.mark.parametrize("after", ["", "</tool_call>", "</tool_call>\n"])
def test_calls_of_hermes_without_ends_are_apart(between: str, after: str) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}'
    assert parse("hermes", f"{call}{between}{call}{after}") == ("", [("now", {}), ("now", {})])
    content, calls = parse("hermes", f"{call}{between}</tool")
    assert (content.strip(), calls) == ("</tool", [("now", {})])


BEGINNINGS = {
    "hermes": "Well, <tool_call>",
    "mistral": "Well, [TOOL_CALLS]",
    "mistral_args": "Well, [TOOL_CALLS]",
    "granite": "Well, <|tool_call|>",
    "phi4": "<|tool_call|>",
    "llama3_json": '{"name": "now", "parameters":',
    "pythonic": "[now(",
    "qwen3_coder": "Well, <tool_call>",
}


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**32), parallel=st.booleans(), special=st.booleans())
def test_a_call_that_has_begun_is_held_to_its_schema(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    name: str,
    seed: int,
    parallel: bool,
    special: bool,
) -> None:
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    grammar = grammar_of(compiler, name, forced=False, parallel=parallel)
    begin = tokenizer.encode(BEGINNINGS[name])
    ids, finished = walk(compiler, tokenizer, grammar, seed, begin=begin)
    if not finished:
        return
    content, calls = parse(name, tokenizer.decode(ids, skip_special_tokens=False))
    assert content in ("Well,", "Well, ", "")
    assert calls
    assert parallel or len(calls) == 1
    for called, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[called])


BARE = {"": "", "```json\n": "```", "\n\n```\n  ": "```"}
"""What stands before a call without tags, and what has to be after it."""


@pytest.mark.parametrize("begin", BARE)
@pytest.mark.parametrize(
    "head",
    [
        '{"name": "get_weather", "arguments": ',
        '{\n  "name" : "get_weather",\n  "parameters":',
        '{"type": "function", "name": "get_weather", "parameters": ',
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_a_call_without_tags_is_held_to_its_schema(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, name: str, begin: str, head: str, parallel: bool
) -> None:
    grammar = grammar_of(special_compiler, name, forced=False, parallel=parallel)
    for seed in range(8):
        first = special_tokenizer.encode(begin + head)
        ids, finished = walk(special_compiler, special_tokenizer, grammar, seed, begin=first)
        if not finished:
            continue
        text = special_tokenizer.decode(ids, skip_special_tokens=False)
        content, calls = parse(name, text)
        assert content == ""
        assert parallel or (len(calls) == 1 and text.rstrip().endswith(BARE[begin]))
        for called, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[called])
    state = special_compiler.compile(grammar).start()
    state.follow(special_tokenizer.encode(f'{begin}{head} {{"days": 3}}\n}}\n{BARE[begin]}'))
    assert special_tokenizer.eos_ids[0] in allowed(state, special_tokenizer.vocab_size)


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@pytest.mark.parametrize(
    "text",
    ['{"name": "other", "arguments": 3}', '{"name": "now"}', '{"name": "now", "age": 3}', "```json\n[1]\n```"],
)
def test_what_only_looks_like_a_call_is_free(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, name: str, text: str
) -> None:
    state = special_compiler.compile(grammar_of(special_compiler, name, forced=False, parallel=True)).start()
    state.follow([*special_tokenizer.encode(text), special_tokenizer.eos_ids[0]])
    assert parse(name, text) == (text, [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["The newt.", "", 'No { call ( here ["', "< | [ {"])
def test_an_answer_may_also_be_text(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, name: str, text: str
) -> None:
    grammar = grammar_of(special_compiler, name, forced=False, parallel=True)
    state = special_compiler.compile(grammar).start()
    ids = [*special_tokenizer.encode(text), special_tokenizer.eos_ids[0]]
    assert [state.accept(id) for id in ids] == [True] * len(ids)


def test_a_special_marker_cannot_be_spelled_out(
    special_compiler: GrammarCompiler, special_tokenizer: Tokenizer, tokenizer: Tokenizer
) -> None:
    """Else a call that the grammar does not see would be parsed."""
    state = special_compiler.compile(grammar_of(special_compiler, "hermes", forced=False, parallel=True)).start()
    spelled = tokenizer.encode("<tool_call>")
    assert len(spelled) > 1
    with pytest.raises(GrammarFailed):
        state.follow(spelled)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("pythonic", {"properties": {"a": {}}, "minProperties": 1}),
        ("pythonic", {"properties": {"a b": {}}}),
        ("pythonic", {"properties": {}, "required": ["a"]}),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "^x"}}}),
        ("qwen3_coder", {"properties": {}, "anyOf": [{"required": ["a"]}]}),
    ],
)
def test_what_a_format_cannot_enforce_is_refused(compiler: GrammarCompiler, name: str, schema: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        grammar_of(compiler, name, forced=True, parallel=True, tools=[Tool("f", schema, "tools[0]")])
    assert caught.value.param == "tools[0]"


# -- reasoning -------------------------------------------------------------------------------------


def reasoned(compiler: GrammarCompiler, name: str, *, inside: bool | None, budget: ThinkingBudget | None = None) -> str:
    builder = GrammarBuilder(compiler.special_id)
    body = builder.part("body", json_part({"type": "integer", "minimum": 0, "maximum": 99}, "schema"))
    return builder.build(REASONING_FORMATS[name].grammar(builder, body, inside=inside), budget)


@settings(max_examples=40)
@given(
    name=st.sampled_from(["qwen3", "mistral", "granite"]),
    seed=st.integers(0, 2**32),
    inside=st.sampled_from([True, False, None]),
    special=st.booleans(),
    budget=st.integers(0, 20),
)
def test_the_answer_after_reasoning_is_held_to_its_form_within_the_budget(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    name: str,
    seed: int,
    inside: bool | None,
    special: bool,
    budget: int,
) -> None:
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    limit = REASONING_FORMATS[name].budget(budget, tokenizer, inside=inside)
    ids, finished = walk(compiler, tokenizer, reasoned(compiler, name, inside=inside, budget=limit), seed)
    assert finished
    text = tokenizer.decode(ids, skip_special_tokens=False)
    parser = ReasoningParser(REASONING_FORMATS[name], inside=inside)
    parts = [parser.feed(text), parser.finish()]
    assert 0 <= int("".join(part[1] for part in parts)) <= 99
    reasoning = "".join(part[0] for part in parts)
    assert (
        not reasoning
        or len(ids) <= budget + len(tokenizer.encode(REASONING_FORMATS[name].begin)) + len(limit.end_ids) + 2 + 4
    ), "two digits, an end and whitespace"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "granite"])
def test_the_budget_is_counted_from_the_begin_of_reasoning(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    special: bool,
    name: str,
) -> None:
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    form = REASONING_FORMATS[name]
    begin, thought = tokenizer.encode(form.begin), tokenizer.encode("The newt lives in water.")
    limit = form.budget(len(thought), tokenizer, inside=None)
    state = compiler.compile(reasoned(compiler, name, inside=None, budget=limit)).start()
    state.follow([*begin, *thought[:-1]])
    assert state.forced() is None
    forced = []
    state.follow([*begin, *thought])
    while (id := state.forced()) is not None and len(forced) < len(limit.end_ids):
        assert allowed(state, tokenizer.vocab_size) == [id]
        assert state.accept(id)
        forced.append(id)
    assert forced == limit.end_ids
    state.follow([*begin, *thought[:3], *limit.end_ids])  # an end before the budget is used up
    assert state.forced() is None
    state.follow(tokenizer.encode("42"))  # and no reasoning at all
    assert state.forced() == tokenizer.eos_ids[0]


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_without_a_budget_is_free(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    special: bool,
) -> None:
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    state = compiler.compile(reasoned(compiler, "qwen3", inside=None)).start()
    text = "<think>\nThe newt { lives in water. " + "And on land. " * 40 + "</think>\n\n42"
    state.follow([*tokenizer.encode(text), tokenizer.eos_ids[0]])
    state.follow([*tokenizer.encode("42"), tokenizer.eos_ids[0]])
    with pytest.raises(GrammarFailed):
        state.follow(tokenizer.encode("The newt"))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_reasoning_may_come_before_any_answer_with_tools(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    special_compiler: GrammarCompiler,
    special_tokenizer: Tokenizer,
    name: str,
    special: bool,
) -> None:
    """Text that the model reasons about is no text of the answer, though both are any text."""
    compiler, tokenizer = (special_compiler, special_tokenizer) if special else (compiler, tokenizer)
    builder, reasoning = GrammarBuilder(compiler.special_id), REASONING_FORMATS["qwen3"]
    builder.reserve(rf"\s*{pattern_of(reasoning.begin)}")
    answer = FORMATS[name].answer(builder, TOOLS, parallel=True)
    builder.free()
    grammar = compiler.compile(builder.build(reasoning.grammar(builder, answer, inside=None)))
    call = '{"name": "now", "arguments": {}}'
    for text in (
        "<think>What? {[</think>Nothing.",
        f"<think>{call} or so</think>Nothing.",
        "Nothing <thin",
        "<thin",
        "<",
    ):
        grammar.start().follow([*tokenizer.encode(text), tokenizer.eos_ids[0]])
    state = grammar.start()
    state.follow(tokenizer.encode("<think>What? </think>" + BEGINNINGS[name]))
    with pytest.raises(GrammarFailed):
        state.follow([*tokenizer.encode("<think>What?"), tokenizer.eos_ids[0]])
