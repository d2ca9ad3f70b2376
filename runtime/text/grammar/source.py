"""Grammars in the language of llguidance: what an answer may be, and what comes before it.

A grammar is one text, with which it is compiled, cached and handed to workers. Its main part is written in llguidance's
variant of Lark; schemas, regular expressions and clients' own grammars are parts with names of their own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from runtime.errors import InvalidRequest
from runtime.text.grammar.budget import ThinkingBudget
from runtime.text.grammar.schema import Schema, check_schema, closed

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Whitespace between two tokens of JSON. Unlimited, it is all that a weak model writes until its output is cut."""

MAX_CHOICES = 10_000
"""Most texts of a choice."""

SpecialId = Callable[[str], int | None]
"""Function from a text to the id of the special token with that text, else None."""


@dataclass(frozen=True)
class Part:
    """One grammar by itself, in llguidance's form: `json_schema` or `lark_grammar`, and its value."""

    kind: str
    value: Any


def json_part(schema: Schema, param: str) -> Part:
    """JSON that is valid under the schema. Raises `InvalidRequest` naming a keyword that cannot be enforced."""
    checked = closed(check_schema(schema, param))
    if checked is True:
        checked = {}
    if checked is False:
        raise InvalidRequest(f"{param} is false, which nothing satisfies.", param=param)
    return Part("json_schema", {**checked, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False}})


def regex_part(regex: str, param: str) -> Part:
    """Text that matches all of a regular expression, in the syntax of Rust's `regex`."""
    return _lark_of(LLMatcher.grammar_from_regex(regex), param)


def choice_part(choices: Sequence[str], param: str) -> Part:
    """One of some texts."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{param} must have between 1 and {MAX_CHOICES} texts, got {len(choices)}.", param=param)
    if not all(choices):
        raise InvalidRequest(f"{param} must not hold an empty text.", param=param)
    return Part("lark_grammar", f"start: CHOICE\nCHOICE: {' | '.join(map(literal, choices))}")


def lark_part(grammar: str, param: str) -> Part:
    """Text in a context-free language: a grammar in Lark's syntax, or in the EBNF of llama.cpp (GBNF)."""
    try:
        return Part("lark_grammar", any_to_lark(grammar))
    except Exception as error:
        raise InvalidRequest(f"{param} is no grammar in Lark or GBNF: {error}", param=param) from error


def _lark_of(grammar: str, param: str) -> Part:
    (only,) = json.loads(grammar)["grammars"]
    assert only.get("lark_grammar"), param
    return Part("lark_grammar", only["lark_grammar"])


def literal(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


class GrammarSource(msgspec.Struct, frozen=True, array_like=True):
    """A whole grammar, as it is encoded in one text."""

    rules: str
    """In llguidance's form."""
    budget: ThinkingBudget | None = None


class GrammarBuilder:
    """A grammar under construction: rules of its main part, and the named parts that they use."""

    def __init__(self, special_id: SpecialId) -> None:
        self._special_id = special_id
        self._rules: dict[str, str] = {}
        self._parts: dict[str, Part] = {}
        self._reserved: list[str] = []

    def reserve(self, pattern: str) -> None:
        """Let no text of an answer begin with what a regular expression of Lark matches: it begins something else.
        Holds for texts that are added until `free` is called."""
        self._reserved.append(pattern)

    def free(self) -> None:
        """Let texts that are added from here on begin with anything."""
        self._reserved.clear()

    def rule(self, name: str, body: str, attributes: str = "") -> str:
        """Add a rule, or a terminal if the name is in capitals. Returns the name."""
        self._rules[f"{name}[{attributes}]" if attributes else name] = body
        return name

    def part(self, name: str, part: Part) -> str:
        """Add a part. Returns the expression that refers to it."""
        self._parts[name] = part
        return f"@{name}"

    def is_special(self, text: str) -> bool:
        return self._special_id(text) is not None

    def marker(self, text: str) -> str:
        """Expression for a text that the model writes as a special token, if it has one with this text."""
        id = self._special_id(text)
        return literal(text) if id is None else f"<[{id}]>"

    def text(self, name: str, *, without: Sequence[str] = ()) -> str:
        """A terminal for any text in which none of some texts occurs. Returns its name."""
        others = "".join(f" & ~/(?s:.*){pattern_of(one)}(?s:.*)/" for one in without)
        return self.rule(name, f"{self.any_text}{others}")

    @property
    def any_text(self) -> str:
        """Expression for any text in a terminal."""
        return "/(?s:.*)/" + "".join(f" & ~/(?s:{one}.*)/" for one in self._reserved)

    def text_through(self, name: str, marker: str) -> str:
        """A rule for any text up to the first `marker`, and the marker. Returns its name."""
        if self.is_special(marker):
            text = self.text(f"{name.upper()}_TEXT", without=[marker])
            return self.rule(name, f"{text} {self.marker(marker)}")
        text = self.rule(f"{name.upper()}_TEXT", self.any_text)
        return self.rule(name, f"{text} {literal(marker)}", "lazy")

    def build(self, start: str, budget: ThinkingBudget | None = None) -> str:
        """The grammar as a text. `start` is the expression for a whole answer, `budget` limits its reasoning."""
        rules = "\n".join(f"{name}: {body}" for name, body in {"start": start, **self._rules}.items())
        grammars: list[dict[str, Any]] = [{"name": "answer", "lark_grammar": rules}]
        grammars += [{"name": name, part.kind: part.value} for name, part in self._parts.items()]
        source = GrammarSource(json.dumps({"grammars": grammars}, ensure_ascii=False), budget)
        return msgspec.json.encode(source).decode()


def pattern_of(text: str) -> str:
    """A regular expression for a text, as it stands between the slashes of Lark."""
    escaped = "".join(char if char.isalnum() or ord(char) > 127 else f"\\x{ord(char):02x}" for char in text)
    return regex_to_lark(escaped)
