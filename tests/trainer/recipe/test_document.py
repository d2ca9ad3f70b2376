"""Reading YAML: YAML 1.2's scalars, lines, and documents that are made to hurt."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.trainer.recipe import RecipeError
from runtime.trainer.recipe.document import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_document
from runtime.trainer.recipe.types import plain


@pytest.mark.parametrize(
    ("text", "value"),
    # The examples of YAML 1.2.2, section 10.3.2, and what YAML 1.1 reads otherwise.
    [
        ("2e-5", 2e-5),
        ("1e-4", 1e-4),
        ("12e03", 12000.0),
        ("-2E+05", -200000.0),
        ("0.", 0.0),
        ("-0.0", -0.0),
        (".5", 0.5),
        ("0o7", 7),
        ("0x3A", 58),
        ("-19", -19),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("2001-12-14", "2001-12-14"),
        ("=", "="),
        ("-.inf", -math.inf),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = read_document(f"key: {text}".encode()).values["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_pair_of_escapes_is_one_character_as_in_json() -> None:
    assert read_document(b'a: "\\ud83d\\ude00"').values == {"a": "\U0001f600"}


def test_not_a_number_and_nothing() -> None:
    assert math.isnan(plain(".nan"))  # type: ignore[arg-type]
    assert read_document(b"key:").values == {"key": None}


@given(st.floats(allow_nan=False))
def test_every_number_comes_back(number: float) -> None:
    text = repr(number).replace("inf", ".inf")
    assert plain(text) == number


def test_quoted_scalars_are_texts() -> None:
    values = read_document(b"a: '2e-5'\nb: \"true\"\nc: ''\nd: |\n  null\n").values
    assert values == {"a": "2e-5", "b": "true", "c": "", "d": "null\n"}


def test_lines_and_nesting() -> None:
    document = read_document(
        b"\xef\xbb\xbfa: 1\ndatasets:\n  - path: x\n    roles: {user: [human, me]}\n\n  - path: y\n"
    )
    assert document.values == {"a": 1, "datasets": [{"path": "x", "roles": {"user": ["human", "me"]}}, {"path": "y"}]}
    assert document.lines["a"] == 1
    assert document.lines["datasets[0].roles.user[1]"] == 4
    assert document.lines["datasets[1].path"] == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 25_000, "line 1: a recipe is a mapping"),
        (b"a: " + b"[" * 25_000, "nested at most 16"),
        (b"{a: " * 25_000, "nested at most 16"),
        (b"a: " * 25_000, "not YAML"),
        (b"a:\n" + b"- " * 25_000, "nested at most 16"),
        (b"a: &x [1]\nb: *x", "line 2: aliases"),
        (b"a: &x [*x]", "aliases"),
        (b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]", "line 2: aliases"),
        (b"a: !!python/object/apply:os.system [ls]", "tags are not allowed, got tag:yaml.org,2002:python"),
        (b"a: !!str 3", "tags are not allowed"),
        (b"a: ! 3", "tags are not allowed"),
        (b"a: 1\nb: 2\na: 3", "a, line 3: the key is given twice, first on line 1"),
        (b"d:\n- p: 1\n  p: 2", r"d\[0\].p, line 3: the key is given twice, first on line 2"),
        (b"a: 1\n---\nb: 2", "line 2: a recipe is one YAML document"),
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"just text", "a mapping of keys"),
        (b"- a", "a mapping of keys"),
        (b"a: 1\nb: \xff", "line 2: .* UTF-8 text, and byte 8 is not"),
        (b"a: 1\nb: \x00", r"line 2: character U\+0000"),
        (b"a: [1", "line 1: this is not YAML"),
        (b"a: 1\n\tb: 2", "line 2: this is not YAML"),
        (b"? [a]\n: b", "a key must be a text"),
        (b"a:\n" + b" - 1\n" * (MAX_NODES + 1), "at most 10000 keys and values"),
        (b"#" * (MAX_BYTES + 1), "at most 131072 bytes"),
        (b'a: 1\nb: "x\\ud800y"', r"b, line 2: holds a lone surrogate \(U\+D800\)"),
        (b'a:\n  "\\udfff": 1', r"a, line 2: holds a lone surrogate \(U\+DFFF\)"),
    ],
)
def test_documents_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        read_document(data)
    assert caught.value.status == 400
    assert caught.value.param


def test_the_deepest_that_is_allowed() -> None:
    depth = MAX_DEPTH - 1
    value = read_document(b"a: " + b"[" * depth + b"]" * depth).values["a"]
    for _ in range(depth - 1):
        (value,) = value
    assert value == []


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        values = read_document(data).values
    except RecipeError:
        return
    assert isinstance(values, dict)
