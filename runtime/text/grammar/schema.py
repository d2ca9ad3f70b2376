"""JSON schemas of clients: checked, and brought into the form in which llguidance enforces every keyword.

llguidance refuses most of the keywords that it cannot enforce, whatever their value. Values that allow everything, such
as `uniqueItems: false`, are removed here first. The keywords that it passes over in silence are refused here. Dates and
times are written as patterns: llguidance's have a 29 February in every year, a year 0 and leap seconds at any minute.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from runtime.errors import InvalidRequest

Schema = dict[str, Any] | bool

MAX_DEPTH = 128
"""Largest number of nested lists and objects in a schema."""

BOUND_STEP = 1e-9
"""Distance between a whole number that is excluded and the first number that is written."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_COMBINING = (
    "allOf", "contains", "dependencies", "dependentSchemas", "else", "if", "not", "oneOf", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
"""Keywords whose schemas hold together, or the other way round."""
_IGNORED = ("disallow", "divisibleBy", "extends", "x-guidance")
"""Keywords of older drafts that llguidance does not know, and its own options, with which a client could have it pass
over others."""

_DATE = (
    "(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Format → pattern of the texts of RFC 3339 that every validator accepts: capital letters, no leap seconds, at most
microseconds."""


def _allows_all(value: object) -> bool:
    return value is True or value == {}


_NEUTRAL: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "uniqueItems": lambda value, schema: value is False,
    "propertyNames": lambda value, schema: _allows_all(value) or value == {"type": "string"},
    "dependentRequired": lambda value, schema: value == {},
    "dependentSchemas": lambda value, schema: value == {},
    "dependencies": lambda value, schema: value == {},
    "unevaluatedItems": lambda value, schema: _allows_all(value),
    "unevaluatedProperties": lambda value, schema: _allows_all(value),
    "not": lambda value, schema: value is False,
    "if": lambda value, schema: "then" not in schema and "else" not in schema,
    "then": lambda value, schema: "if" not in schema or _allows_all(value),
    "else": lambda value, schema: "if" not in schema or _allows_all(value),
    "minContains": lambda value, schema: "contains" not in schema,
    "maxContains": lambda value, schema: "contains" not in schema,
}
"""Keyword → true for a value that allows everything in a schema."""


def parse_schema(text: str | bytes, param: str) -> Schema:
    """The schema in a JSON text. Raises `InvalidRequest`."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param} must be a JSON schema: {error}.", param=param) from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{param} must be a JSON schema, an object; got {type(schema).__name__}.", param=param)
    return schema


def check_schema(schema: Schema, param: str) -> Schema:
    """A copy of the schema in which every keyword can be enforced, as far as this can be told without compiling it.
    Raises `InvalidRequest` naming the keyword, and the depth of one that is too deep."""
    check_depth(schema, param)
    checked: Schema = _checked(schema, param)
    return checked


def closed(schema: Schema) -> Schema:
    """The schema with objects of declared properties that have no others, where it does not say what others may be: a
    model would make some up, which clients do not expect.

    Everything that fits the copy fits the schema: one that combines schemas, in which closing one could let through
    more, or nothing, is left as it is.
    """
    found: Schema = schema if _combines(schema) else _closed(schema)
    return found


def _combines(schema: Any) -> bool:
    return isinstance(schema, dict) and (
        any(keyword in schema for keyword in _COMBINING) or any(_combines(one) for one in _subschemas(schema))
    )


def _subschemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list) and keyword in (*_LISTS, "items"):
            yield from value
        elif keyword in _SINGLES:
            yield value


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {name: _closed(one) for name, one in value.items()}
        elif isinstance(value, list) and keyword in (*_LISTS, "items"):
            found[keyword] = [_closed(one) for one in value]
        else:
            found[keyword] = _closed(value) if keyword in _SINGLES else value
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(properties, dict)
        and not any(
            keyword in schema for keyword in ("additionalProperties", "patternProperties", "minProperties", "$ref")
        )
        and isinstance(required, list)
        and all(name in properties for name in required)
    ):
        found["additionalProperties"] = False
    return found


def check_depth(value: object, param: str) -> None:
    """Raise `InvalidRequest` for lists and objects nested deeper than `MAX_DEPTH`."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for one in level for child in _children(one)]
        if not level:
            return
    raise InvalidRequest(f"{param} must be nested at most {MAX_DEPTH} deep.", param=param)


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _checked(schema: Any, path: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    for keyword in _IGNORED:
        if keyword in schema:
            raise InvalidRequest(f"`{keyword}` cannot be enforced, in {path}.", param=path.split(".")[0])
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _NEUTRAL and _NEUTRAL[keyword](value, schema):
            continue
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {name: _checked(one, f"{path}.{keyword}.{name}") for name, one in value.items()}
        elif keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
            items = value if isinstance(value, list) else []
            found[keyword] = [_checked(one, f"{path}.{keyword}") for one in items] if items else value
        elif keyword in _SINGLES:
            found[keyword] = _checked(value, f"{path}.{keyword}")
        else:
            found[keyword] = value
    return _with_exact_formats(_with_inclusive_bounds(found))


def _with_exact_formats(schema: dict[str, Any]) -> dict[str, Any]:
    pattern = _FORMATS.get(schema.get("format", "")) if isinstance(schema.get("format"), str) else None
    if pattern is None:
        return schema
    del schema["format"]
    if "pattern" in schema:
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]
    else:
        schema["pattern"] = pattern
    return schema


def _with_inclusive_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """Exclusive bounds of numbers that are whole, as a bound a little further inside: llguidance lets them through."""
    if schema.get("type") == "integer":
        return schema
    for exclusive, inclusive, direction, tighter in (
        ("exclusiveMinimum", "minimum", 1.0, max),
        ("exclusiveMaximum", "maximum", -1.0, min),
    ):
        bound, given = schema.get(exclusive), schema.get(inclusive)
        if bound is True and _is_whole(given):  # the form of draft 4
            schema[inclusive] = _inside(given, direction)
            del schema[exclusive]
        elif bound is not True and _is_whole(bound):
            within = _inside(bound, direction)
            schema[inclusive] = tighter(within, given) if isinstance(given, int | float) else within
            del schema[exclusive]
    return schema


def _inside(bound: float, direction: float) -> float:
    return bound + direction * max(BOUND_STEP, 4 * math.ulp(bound))


def _is_whole(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53 and value % 1 == 0
