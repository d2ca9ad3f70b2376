"""A recipe's YAML to plain values and the lines they stand on, within limits and without recursion.

The values are built straight from the parser's events: PyYAML's own composer and constructor recurse (a deeply
nested document kills the process in its C form), follow aliases and tags, and let a second key win in silence.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from msgspec import Struct, field

from runtime.errors import InvalidRequest
from runtime.trainer.recipe.types import plain
from settings.schema import MAX_RECIPE

# -- problems --------------------------------------------------------------------------------------
#
# What is wrong with a recipe: every problem found, each with its key and line.

SHOWN = 50
"""Most problems that one message lists."""


class Problem(Struct, frozen=True):
    """One thing that is wrong."""

    key: str
    """Path of the key, as in `datasets[0].type`; empty when it is the whole file."""
    message: str
    line: int | None = None
    """From 1; None when the recipe did not come as text, or the key is not in it."""

    def __str__(self) -> str:
        place = ", ".join(filter(None, [self.key, f"line {self.line}" if self.line else ""]))
        return f"{place}: {self.message}" if place else self.message


class RecipeError(InvalidRequest):
    """The recipe cannot be used as it is. `problems` has all that was found; `param` is the first one's key."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"… and {len(self.problems) - SHOWN} more")
        head = "" if len(lines) == 1 else f"The recipe has {len(self.problems)} problems:\n"
        super().__init__(head + "\n".join(lines), param=self.problems[0].key or "recipe", code="invalid_recipe")


MAX_BYTES = MAX_RECIPE
MAX_DEPTH = 16
MAX_NODES = 10_000


class Document(Struct):
    """Keys and values of a recipe, as they are given."""

    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    """Path of a key or item (`datasets[0].type`) → its line, from 1."""


class _Open(Struct):
    """A mapping or sequence that has begun."""

    value: dict[str, Any] | list[Any]
    path: str
    key: str | None = None
    """Key of a mapping whose value comes next."""

    def child(self) -> str:
        if isinstance(self.value, list):
            return f"{self.path}[{len(self.value)}]"
        return f"{self.path}.{self.key}" if self.path else str(self.key)

    def add(self, value: Any) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        else:
            self.value[str(self.key)] = value
            self.key = None


def read_document(data: bytes) -> Document:
    """Parse one YAML document whose root is a mapping. Raises `RecipeError`."""
    if len(data) > MAX_BYTES:
        raise _error(f"a recipe has at most {MAX_BYTES} bytes, this one has {len(data)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error(
            f"a recipe is UTF-8 text, and byte {error.start} is not", data.count(b"\n", 0, error.start) + 1
        ) from None
    try:
        return _build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _error(f"this is not YAML: {error.problem}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(f"character U+{_code(error.character):04X} is not allowed in YAML", line) from None


def _build(events: Iterator[Any]) -> Document:
    document = Document({})
    stack: list[_Open] = []
    nodes = documents = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _error("a recipe is one YAML document, and a second one begins here", line)
        elif isinstance(event, yaml.AliasEvent):
            raise _error(f"aliases (*{event.anchor}) are not allowed: write the value out", line)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if nodes > MAX_NODES:
                raise _error(f"a recipe has at most {MAX_NODES} keys and values", line)
            if event.tag is not None:
                raise _error(f"tags are not allowed, got {event.tag[:64]}", line)
            _place(event, stack, document, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
    if not documents:
        raise _error("the recipe is empty")
    return document


def _place(event: Any, stack: list[_Open], document: Document, line: int) -> None:
    """Put a node that begins where it belongs."""
    if not stack:
        if not isinstance(event, yaml.MappingStartEvent):
            raise _error("a recipe is a mapping of keys to values, as in `learning_rate: 2e-4`", line)
        stack.append(_Open(document.values, ""))
        return
    parent = stack[-1]
    if isinstance(parent.value, dict) and parent.key is None:
        parent.key = _key(event, parent, document, line)
        document.lines[parent.child()] = line
        return
    path = parent.child()
    document.lines.setdefault(path, line)
    if isinstance(event, yaml.ScalarEvent):
        text = _text(event.value, line, path)
        parent.add(plain(text) if event.implicit[0] else text)
        return
    if len(stack) >= MAX_DEPTH:
        raise _error(f"a recipe is nested at most {MAX_DEPTH} deep", line, path[:64])
    value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
    parent.add(value)
    stack.append(_Open(value, path))


def _key(event: Any, parent: _Open, document: Document, line: int) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _error("a key must be a text", line, parent.path)
    key = _text(event.value, line, parent.path)
    if key in parent.value:
        path = f"{parent.path}.{key}" if parent.path else key
        raise _error(f"the key is given twice, first on line {document.lines[path]}", line, path)
    return key


def _text(value: str, line: int, path: str) -> str:
    """The text of a scalar. Escapes may be both halves of a surrogate pair: one character together, as in JSON."""
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            code = next(ord(char) for char in value if 0xD800 <= ord(char) <= 0xDFFF)
            raise _error(f"holds a lone surrogate (U+{code:04X})", line, path[:64]) from None
    return value


def _code(character: str | bytes | int) -> int:
    """PyYAML has a number here, whatever its types say."""
    return character if isinstance(character, int) else ord(character)


def _error(message: str, line: int | None = None, key: str = "") -> RecipeError:
    return RecipeError([Problem(key, message, line)])
