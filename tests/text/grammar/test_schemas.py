"""Answers under JSON schemas, checked by `jsonschema`, and what is refused."""

import json
from datetime import datetime
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.text.grammar import GrammarCompiler
from runtime.text.grammar.schema import MAX_DEPTH, check_schema, closed, parse_schema
from runtime.text.tokenizer import Tokenizer
from tests.text.grammar.grammars import text_of
from tests.text.grammar.walks import allowed, walk

SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-200, 200),
        st.integers(0, 50),
    ),
    st.builds(
        lambda low, size: {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + size},
        st.integers(-200, 200),
        st.integers(2, 50),
    ),
    st.builds(
        lambda low, size: {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + size},
        st.integers(-20, 20) | st.floats(-20, 20).map(lambda x: round(x, 2)),
        st.integers(1, 50),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 4),
        st.integers(0, 5),
    ),
    st.sampled_from(["^[a-c]{1,3}$", "x|yz", "^a+b?$", r"^\d{2}-\d$", "[^a]b$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]).map(lambda form: {"type": "string", "format": form}),
    st.lists(st.sampled_from(["red", 'a"b', "ü\n", 3, 2.5, None, True, [1], {"k": "v"}]), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["x", 7, None, {"a": [1, {"b": False}]}]).map(lambda value: {"const": value}),
)


def objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "city name", 'q"', "été", "uniqueItems"])

    def of(properties: dict[str, Any], count: int, rest: Any) -> dict[str, Any]:
        found = {"type": "object", "properties": properties, "required": list(properties)[:count]}
        return found if rest is None else {**found, "additionalProperties": rest}

    return st.builds(
        of,
        st.dictionaries(names, children, max_size=4),
        st.integers(0, 4),
        st.none() | st.just(False) | st.just({"type": "integer", "maximum": 5}),
    )


def arrays(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
        children,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda children: (
        objects(children)
        | arrays(children)
        | st.lists(children, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_answer_is_valid(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, seed: int) -> None:
    ids, finished = walk(compiler, tokenizer, text_of(compiler, schema), seed)
    assert finished
    jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


INSTANCES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "a", "red", "x"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("abcd"), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(schema=objects(SCHEMAS), value=st.dictionaries(st.sampled_from(["a", "b", "z"]), INSTANCES, max_size=3))
def test_what_fits_a_closed_schema_fits_the_schema(schema: dict[str, Any], value: Any) -> None:
    validator = jsonschema.Draft202012Validator(closed(schema))
    declared = "additionalProperties" in schema or not set(schema["required"]) <= set(schema["properties"])
    if validator.is_valid(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)
        assert declared or set(value) <= set(schema["properties"])


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        (
            {"properties": {"a": {"items": {"properties": {"b": {}}}}}, "additionalProperties": True},
            {
                "properties": {"a": {"items": {"properties": {"b": {}}, "additionalProperties": False}}},
                "additionalProperties": True,
            },
        ),
        ({"properties": {}, "required": ["x"]}, {"properties": {}, "required": ["x"]}),
        ({"properties": {}, "patternProperties": {"^x": {}}}, {"properties": {}, "patternProperties": {"^x": {}}}),
        (
            {"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
            {"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
        ),
        (
            {"$defs": {"P": {"properties": {"x": {}}}}, "anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
            {
                "$defs": {"P": {"properties": {"x": {}}, "additionalProperties": False}},
                "anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}],
            },
        ),
    ],
)
def test_objects_of_declared_properties_are_closed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert closed(schema) == expected


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"anyOf": [{"contains": {"const": 1}}]}, "contains"),
        ({"divisibleBy": 3}, "divisibleBy"),
        ({"items": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"if": {"const": 1}, "then": False}, "if"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "stsring"}, "stsring"),
        ({"type": "string", "pattern": "[.*"}, "regex"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "http://127.0.0.1:1/schema.json"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "none"),
        (False, "schema"),
        ({"$ref": "#"}, "cannot be used"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(compiler: GrammarCompiler, schema: Any, keyword: str) -> None:
    with pytest.raises(InvalidRequest, match=keyword.replace(".", r"\.")) as caught:
        compiler.compile(text_of(compiler, schema), param="schema")
    assert caught.value.param == "schema"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": False},
        {"type": "object", "propertyNames": {"type": "string"}, "dependentRequired": {}},
        {"if": {"const": 1}},
        {"type": "object", "unevaluatedProperties": True, "properties": {"not": {"const": 1}}},
        {"const": {"uniqueItems": True}},
        {"type": "object", "additionalProperties": False, "title": "T", "description": "d", "default": {}},
        True,
    ],
)
def test_values_that_allow_everything_are_no_obstacle(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any
) -> None:
    answers = [walk(compiler, tokenizer, text_of(compiler, schema), seed) for seed in range(8)]
    assert all(ended for _, ended in answers)
    for ids, _ in answers:
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


@pytest.mark.parametrize(
    ("format", "valid", "text"),
    [
        ("date", True, "2000-02-29"),
        ("date", True, "0004-02-29"),
        ("date", True, "9999-12-31"),
        ("date", False, "1900-02-29"),
        ("date", False, "2023-02-29"),
        ("date", False, "2023-04-31"),
        ("date", False, "0000-01-01"),
        ("time", True, "23:59:59.123456+23:59"),
        ("time", False, "12:00:60Z"),
        ("time", False, "24:00:00Z"),
        ("date-time", True, "2024-02-29T00:00:00Z"),
        ("date-time", False, "2024-02-30T00:00:00Z"),
        ("date-time", False, "2024-02-29t00:00:00z"),
        ("date-time", False, "2024-02-29T23:59:60Z"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"pattern": "^.{8}"}, {"type": "string", "allOf": [{"pattern": "[0-9]"}]}])
def test_dates_and_times_are_in_the_calendar(
    compiler: GrammarCompiler, tokenizer: Tokenizer, format: str, valid: bool, text: str, more: dict[str, Any]
) -> None:
    state = compiler.compile(text_of(compiler, {"format": format, **more})).start()
    taken = all(state.accept(id) for id in tokenizer.encode(json.dumps(text)))
    assert (taken and tokenizer.eos_ids[0] in allowed(state, tokenizer.vocab_size)) == valid
    if valid:
        assert datetime.fromisoformat(f"2000-01-01T{text}" if format == "time" else text)


def test_a_schema_that_is_too_deep_is_refused_by_its_depth() -> None:
    schema: Any = {"type": "string"}
    for _ in range(MAX_DEPTH):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match=f"at most {MAX_DEPTH} deep"):
        check_schema(schema, "schema")


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', '{"minimum": NaN}', "[" * 100_000])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON schema"):
        parse_schema(text, "schema")
