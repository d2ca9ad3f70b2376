"""A value of a recipe to the type of its key, and what a type expects, in words."""

import math
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from runtime.adapters.store import name_problem
from runtime.trainer.recipe.schema import Recipe

# -- scalars ---------------------------------------------------------------------------------------
#
# Plain YAML scalars by the rules of YAML 1.2's core schema (section 10.3.2).
#
# PyYAML follows YAML 1.1, which reads `2e-5` as a text and `no` and `on` as booleans.

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_GROUPED = re.compile(r"(?<=[0-9])_(?=[0-9])")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = frozenset({".nan", ".NaN", ".NAN"})
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}

LONGEST_NUMBER = 100
"""Characters; longer ones stay text: Python refuses, or is slow, to read them."""

Scalar = str | int | float | bool | None


def plain(text: str) -> Scalar:
    """The value of a scalar that was written without quotes."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    number = as_number(text)
    return text if number is None else number


def as_number(text: str) -> int | float | None:
    """The number that `text` is, or None."""
    if len(text) > LONGEST_NUMBER:
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", ""))
    return float("nan") if text in _NAN else None


def lenient_number(text: str) -> int | float | None:
    """The same, where `500_000` is a number too, as in YAML 1.1."""
    return as_number(_GROUPED.sub("", text))


def as_bool(text: str) -> bool | None:
    """Value of `yes`, `on`, `no` and `off` where a boolean is expected; else None."""
    return _WORDS.get(text.lower())


_NOUNS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises `ValueError` with what was expected and given.

    Where a boolean is expected, the words yes, no, on and off are ones; where a number is, a text that is one.
    """
    for candidate in _readings(value, hint):
        if any(isinstance(x, float) and not math.isfinite(x) for x in _leaves(candidate)):
            break
        try:
            return msgspec.convert(candidate, hint)
        except msgspec.ValidationError:
            continue
    raise ValueError(f"expected {describe(hint)}, got {show(value)}")


def check_length(length: int, hint: Any) -> None:
    """Raise `ValueError` when a list of structs is shorter or longer than its key allows."""
    _, metas = _strip(hint)
    least = next((meta.min_length for meta in metas if meta.min_length is not None), 0)
    most = next((meta.max_length for meta in metas if meta.max_length is not None), length)
    if not least <= length <= most:
        raise ValueError(f"expected {least} to {most} entries, got {length}")


def show(value: Any) -> str:
    """A value as it stands in an error message."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    text = text if len(text) <= 80 else text[:77] + "…"
    return repr(text) if isinstance(value, str) else text


def describe(hint: Any) -> str:
    """Values that a key of this type takes, as in "expected …"."""
    base, metas = _strip(hint)
    if get_origin(base) in (Union, types.UnionType):
        return " or ".join(describe(_with(option, metas)) for option in _options(base))
    if get_origin(base) is Literal:
        choices = get_args(base)
        return "one of " + ", ".join(choices) if len(choices) > 1 else str(choices[0])
    if get_origin(base) is tuple:
        inner, _ = _strip(get_args(base)[0])
        if get_origin(inner) is Literal:
            return "a list of " + ", ".join(get_args(inner))
        return f"a list of {_PLURALS.get(inner, 'mappings')}"
    if base is str and any((meta.min_length or 0) > 0 for meta in metas):
        return "a text that is not empty"
    noun = _NOUNS.get(base, "a mapping of keys to values")
    return noun + ("" if base is bool else _range(metas))


def literals(hint: Any) -> tuple[str, ...]:
    """The texts that a key of this type takes, where they are a fixed list."""
    base, _ = _strip(hint)
    if get_origin(base) in (Union, types.UnionType):
        return tuple(text for option in _options(base) for text in literals(option))
    return get_args(base) if get_origin(base) is Literal else ()


def struct_of(hint: Any, value: Any = None) -> tuple[type[Struct] | None, bool]:
    """The struct that a key of this type holds, if any, and whether as a list of them. Where a key takes a struct or
    something else, a mapping is a struct."""
    base, _ = _strip(hint)
    if get_origin(base) in (Union, types.UnionType):
        found = [option for option in map(struct_of, _options(base)) if option[0] is not None]
        return found[0] if found and isinstance(value, dict) else (None, False)
    many = get_origin(base) is tuple
    inner, _ = _strip(get_args(base)[0]) if many else (base, ())
    return (inner if isinstance(inner, type) and issubclass(inner, Struct) else None), many


def _readings(value: Any, hint: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, str):
        word, number = as_bool(value), lenient_number(value)
        if word is not None and _takes(hint, bool):
            yield word
        if number is not None and (_takes(hint, int) or _takes(hint, float)):
            yield number
    elif isinstance(value, float) and value.is_integer() and _takes(hint, int):
        yield int(value)


def _takes(hint: Any, kind: type) -> bool:
    base, _ = _strip(hint)
    if get_origin(base) in (Union, types.UnionType):
        return any(_takes(option, kind) for option in _options(base))
    return (get_origin(base) or base) is kind


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _strip(hint: Any) -> tuple[Any, tuple[Meta, ...]]:
    """The type without its annotations, and these."""
    metas: tuple[Meta, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        metas = (*more, *metas)
    return hint, metas


def _with(hint: Any, metas: tuple[Meta, ...]) -> Any:
    return Annotated[hint, *metas] if metas else hint


def _options(union: Any) -> list[Any]:
    return [option for option in get_args(union) if option is not type(None)]


def _range(metas: tuple[Meta, ...]) -> str:
    words = [("at least", "ge"), ("above", "gt"), ("at most", "le"), ("below", "lt")]
    found = [f"{word} {_number(limit)}" for word, name in words if (limit := _limit(metas, name)) is not None]
    if not found:
        return ""
    return (" of " if found[0].startswith("at") else " ") + " and ".join(found)


def _limit(metas: tuple[Meta, ...], name: str) -> float | None:
    return next((value for meta in metas if (value := getattr(meta, name)) is not None), None)


def _number(value: float) -> str:
    return f"{int(value)}" if float(value).is_integer() else f"{value:g}"


# -- roles -----------------------------------------------------------------------------------------
#
# Roles of messages: the chat templates' own, and the names that files have for them.

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}


def role_names(added: Mapping[str, tuple[str, ...] | str]) -> dict[str, str]:
    """Name in the file → role. `added` is a recipe's `roles`: role, by any of its names → further names of it.

    A key of `added` that is no role's name is left out: `find_problems` reports it.
    """
    names = dict(_NAMES)
    for role, aliases in added.items():
        if role in _NAMES:
            names |= dict.fromkeys([aliases] if isinstance(aliases, str) else aliases, _NAMES[role])
    return names


def unknown_roles(added: Mapping[str, tuple[str, ...] | str]) -> list[str]:
    """Keys of a recipe's `roles` that are no role's name."""
    return [role for role in added if role not in _NAMES]


# -- names -----------------------------------------------------------------------------------------
#
# The name of the adapter that a recipe asks for.


def adapter_name(recipe: Recipe, job_id: str) -> str:
    """The name to publish under: the recipe's, else the last part of its `output_dir`, else the job's id."""
    last = (recipe.output_dir or "").rstrip("/").rpartition("/")[2]
    return recipe.name or (last if name_problem(last) is None else job_id)
