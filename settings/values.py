"""One given value to one setting's value, checked against the schema, and back to text.

A text (flag, variable) and a TOML or Python value are told apart by the caller: a TOML string for
a number is only read where the setting has a unit.
"""

import math
import re
from decimal import Decimal
from typing import Any

import msgspec

from settings import units
from settings.fields import Field

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_DECIMAL = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LARGEST = 2**63 - 1

_BYTE_SCALES = [("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)]


def from_text(field: Field, text: str) -> Any:
    """The value that a flag or variable stands for. Raises `ValueError` with what was expected and given."""
    if field.base is tuple:
        return check(field, [part.strip() for part in text.split(",")])
    if field.unit:
        return check(field, _with_unit(field, text))
    if field.base is bool:
        word = text.strip().lower()
        return check(field, True if word in _TRUE else False if word in _FALSE else text)
    if field.base is int and _INTEGER.fullmatch(text.strip()):
        return check(field, int(text))
    if field.base is float and _DECIMAL.fullmatch(text.strip()):
        return check(field, float(text))
    return check(field, text)


def from_value(field: Field, value: object) -> Any:
    """The same for a TOML or Python value."""
    if isinstance(value, str) and field.unit:
        return check(field, _with_unit(field, value))
    if isinstance(value, str) and field.base is tuple:
        return check(field, [value])
    return check(field, value)


def check(field: Field, value: object) -> Any:
    """`value` as the schema's type. Raises `ValueError` with the limit and the value given."""
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= _LARGEST):
        raise _unexpected(field, value)
    try:
        return msgspec.convert(value, field.type, strict=True)
    except msgspec.ValidationError:
        raise _unexpected(field, value) from None


def show(field: Field, value: object) -> str:
    """The value as people write it: `32MiB`, `8192`, `30s`, `true`; "" for None and for no values.

    `from_text` reads it back. Never shows a secret: only how many there are.
    """
    if value is None:
        return ""
    if field.secret:
        return f"{len(value)} set (hidden)" if isinstance(value, tuple) and value else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if field.unit == "seconds" and isinstance(value, float) and value % 86400 == 0:
        return f"{value / 86400:.0f}d"
    if field.unit == "seconds":
        text = format(Decimal(repr(value)), "f")  # positional: a unit cannot follow an exponent
        return (text.rstrip("0").rstrip(".") if "." in text else text) + "s"
    if isinstance(value, int) and field.unit == "bytes":
        name, factor = next(((n, f) for n, f in _BYTE_SCALES if value % f == 0), ("", 1))
        return f"{value // factor}{name}"
    return str(value)


def _with_unit(field: Field, text: str) -> object:
    """The number in `text`, or `text` itself, which `check` then refuses with what was expected."""
    try:
        number = units.parse(text, field.unit or "")
    except ValueError:
        return text
    return int(number) if field.base is int and number.is_integer() else number


def _unexpected(field: Field, value: object) -> ValueError:
    given = "something else (hidden)" if field.secret else repr(value)
    if field.secret and (not value or (isinstance(value, list) and "" in value)):
        given = "an empty string"
    return ValueError(f"expected {field.expects}, got {given}")
