"""Plain YAML scalars by the rules of YAML 1.2's core schema (section 10.3.2).

PyYAML follows YAML 1.1, which reads `2e-5` as a text and `no` and `on` as booleans.
"""

import re

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
    """The same, with `500_000` being one, as it is for whoever reads YAML 1.1."""
    return as_number(_GROUPED.sub("", text))


def as_bool(text: str) -> bool | None:
    """What `yes`, `on`, `no` and `off` mean where a boolean is expected, or None."""
    return _WORDS.get(text.lower())
