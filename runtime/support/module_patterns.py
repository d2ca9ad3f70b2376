"""Values of single modules of a model by patterns over their names: `rank_pattern` and `alpha_pattern`, as PEFT has
them.

A key is the end of a module's name, from a dot on, or a regular expression: PEFT takes the first key for which
`(.*\\.)?(key)$` matches. Keys come from the author of an adapter or a recipe, and there may be as many of them as
modules. So names are looked up, and expressions run with the interpreter's lock released and for a bounded time.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from time import monotonic
from typing import Generic, TypeVar

import regex

V = TypeVar("V")

MAX_KEYS = 8192
"""Largest number of keys, more than any model has linears: tools that choose ranks write a key for every linear."""
MAX_EXPRESSIONS = 64
MAX_KEY_CHARACTERS = 200
MAX_QUANTIFIERS = 3
MATCH_SECONDS, TOTAL_SECONDS = 0.05, 1.0

_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")


class PatternInvalid(ValueError):
    """A key is no expression, too complex, or one too many. The message is a sentence that names the pattern."""


class ModulePattern(Generic[V]):
    """The keys of one pattern, ready for look-ups."""

    def __init__(self, name: str, values: Mapping[str, V]) -> None:
        """Compile the keys. Raises `PatternInvalid` naming a key that is no expression, or whose match could take for
        ever."""
        self._name = name
        self.values = values
        """Key → value, in their order."""
        order = {key: index for index, key in enumerate(values)}
        if len(order) > MAX_KEYS:
            raise PatternInvalid(f"{name} must have at most {MAX_KEYS} keys, got {len(order)}.")
        self._names = {key: order[key] for key in values if _NAME.fullmatch(key)}
        expressions = [key for key in values if key not in self._names]
        if len(expressions) > MAX_EXPRESSIONS:
            raise PatternInvalid(
                f"{name} must have at most {MAX_EXPRESSIONS} keys that are regular expressions and no names, "
                f"got {len(expressions)}, such as {expressions[0][:MAX_KEY_CHARACTERS]!r}."
            )
        self._expressions = [(order[key], key, _compiled(name, key)) for key in expressions]
        self._seconds = 0.0

    def get(self, module: str, default: V) -> V:
        """The value of the first key that matches, else `default`. Raises `PatternInvalid` where that takes too
        long."""
        if not self.values:
            return default
        found = [(self._names[end], end) for end in ends(module) if end in self._names]
        first = min(found, default=None)
        for index, key, expression in self._expressions:
            if first is not None and index > first[0]:
                break
            if self._matches(expression, key, module):
                return self.values[key]
        return default if first is None else self.values[first[1]]

    def matching(self, module: str) -> list[str]:
        """Every key that matches, in their order. Raises as `get`."""
        found = {end for end in ends(module) if end in self._names}
        found |= {key for _, key, expression in self._expressions if self._matches(expression, key, module)}
        return [key for key in self.values if key in found]

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """The keys that match none of the modules. Raises as `get`."""
        known = {end for module in modules for end in ends(module)}
        absent = {key for key in self._names if key not in known}
        for _, key, expression in self._expressions:
            if not any(self._matches(expression, key, module) for module in modules):
                absent.add(key)
        return [key for key in self.values if key in absent]

    def _matches(self, expression: "regex.Pattern[str]", key: str, module: str) -> bool:
        began = monotonic()
        try:
            found = expression.match(module, timeout=MATCH_SECONDS, concurrent=True) is not None
        except TimeoutError:
            found, self._seconds = False, TOTAL_SECONDS
        self._seconds += monotonic() - began
        if self._seconds > TOTAL_SECONDS:
            raise PatternInvalid(f"{self._name} has the key {key!r}, which takes too long to match.")
        return found


def ends(module: str) -> Iterator[str]:
    """A module's whole name, and without its first parts."""
    parts = module.split(".")
    return accumulate(reversed(parts), lambda end, part: f"{part}.{end}")


def _compiled(name: str, key: str) -> "regex.Pattern[str]":
    quantifiers = sum(map(key.count, "*+?{"))
    if len(key) > MAX_KEY_CHARACTERS or _QUANTIFIED_GROUP.search(key) or quantifiers > MAX_QUANTIFIERS:
        raise PatternInvalid(
            f"{name} has the key {key[:100]!r}, too complex an expression: at most {MAX_KEY_CHARACTERS} "
            f"characters, {MAX_QUANTIFIERS} repetitions, and no repeated group."
        )
    whole = rf"(.*\.)?({key})$"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax whose meaning may change
            # As PEFT compiles it. Flags such as (?i) are allowed at the beginning alone; in `whole` they are not at the
            # beginning.
            re.compile(key)
            re.compile(whole)
            return regex.compile(whole)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternInvalid(f"{name} has the key {key[:100]!r}, no regular expression: {error}.") from None
