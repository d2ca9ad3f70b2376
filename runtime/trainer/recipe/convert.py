"""From plain values to the structs of a recipe, collecting every problem instead of stopping at the first."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import NODEFAULT, Struct

from runtime.trainer.recipe import types
from settings import suggest

S = TypeVar("S", bound=Struct)

_STAND_INS: Mapping[str, Any] = {"adapter": "lora", "learning_rate": 1e-4, "datasets": (), "path": "-"}
"""Of keys that have no default."""

Report = Callable[[str, str], None]
"""Called with the path of a key and what is wrong with it."""


def convert_struct(
    struct: type[S], values: Mapping[str, Any], path: str, report: Report, *, beside: frozenset[str] = frozenset()
) -> S:
    """The struct. What was reported has its default in it, so that the rest can be checked, too.

    A null is the same as a key that is absent. `beside` are keys that somebody else looks after; they are known.
    """
    hints = get_type_hints(struct, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(struct) if field.name != "notes"}
    given: dict[str, Any] = {}
    for name in values:
        if name not in fields and name not in beside:
            near = suggest.hint(name, [*fields, *beside], cutoff=0.75)
            report(_join(path, name[:64]), f"unknown key{near}")
    for name, field in fields.items():
        value = values.get(name)
        if value is None:
            if field.default is NODEFAULT and field.default_factory is NODEFAULT:
                report(_join(path, name), f"is missing: expected {types.describe(hints[name])}")
                given[name] = _STAND_INS[name]
            continue
        try:
            given[name] = _convert(hints[name], value, _join(path, name), report)
        except ValueError as error:
            report(_join(path, name), str(error) + _near(value, hints[name]))
            if name in _STAND_INS:
                given[name] = _STAND_INS[name]
    return struct(**given)


def _convert(hint: Any, value: Any, path: str, report: Report) -> Any:
    inner, many = types.struct_of(hint)
    if inner is None:
        return types.convert(value, hint)
    if not many:
        if not isinstance(value, dict):
            raise ValueError(f"expected {types.describe(hint)}, got {types.show(value)}")
        return convert_struct(inner, value, path, report)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"expected {types.describe(hint)}, got {types.show(value)}")
    types.check_length(len(items), hint)
    return tuple(convert_struct(inner, item, f"{path}[{index}]", report) for index, item in enumerate(items))


def _near(value: object, hint: Any) -> str:
    return suggest.hint(value, types.literals(hint)) if isinstance(value, str) else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
