"""The schema as a flat list: what a flag, a variable, a TOML key and a line of documentation are made from.

Reads the types of `settings.schema`; knows nothing of where values come from.
"""

import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from settings.schema import Settings


class Field(Struct, frozen=True, kw_only=True):
    """One setting."""

    section: str
    name: str
    type: Any
    """The annotation in the schema, with its limits: what `msgspec.convert` checks a value against."""
    default: Any
    doc: str
    base: Any
    """The bare type: `int`, `float`, `bool`, `str` or `tuple`."""
    unit: str | None
    """"count", "bytes", "seconds", or None for a plain number or no number."""
    optional: bool
    choices: tuple[str, ...]
    limits: tuple[Meta, ...]
    secret: bool
    """Never shown, in no error and no listing."""
    example: Any
    """What to write in the example file where the default has no TOML form."""

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return f"EFT_{self.section}_{self.name}".upper()

    @property
    def expects(self) -> str:
        """The values it takes, as in "expected …, got …"."""
        if told := next((told for meta in self.limits if (told := (meta.extra or {}).get("expects"))), None):
            return str(told)
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.base is bool:
            return "true or false"
        if self.base is tuple:
            return "a list of non-empty strings"
        if self.base is str:
            return self.doc.rstrip(".") if self._pattern else "a non-empty string"
        noun = {"bytes": "a size", "seconds": "a time"}.get(
            self.unit or "", "a number" if self.base is float else "a whole number"
        )
        units = {
            "count": " (units: K, M)",
            "bytes": " (units: KiB, MiB, GiB, KB, MB, GB)",
            "seconds": " (units: ms, s, m, h, d)",
        }.get(self.unit or "", "")
        return f"{noun}{self._range}{units}"

    @property
    def _pattern(self) -> bool:
        return any(meta.pattern for meta in self.limits)

    @property
    def _range(self) -> str:
        least = next((m.ge for m in self.limits if m.ge is not None), None)
        most = next((m.le for m in self.limits if m.le is not None), None)
        above = next((m.gt for m in self.limits if m.gt is not None), None)
        if least is not None and most is not None:
            return f" from {least} to {most}"
        if least is not None:
            return f" of at least {least}" + (" byte" if self.unit == "bytes" else "")
        if above is None:
            return ""
        return f" above {above}" + (f" and at most {most}" if most is not None else "")


@functools.cache
def sections() -> dict[str, type[Struct]]:
    """Section name → its struct, in schema order."""
    return {f.encode_name: f.type for f in msgspec.structs.fields(Settings)}


@functools.cache
def fields() -> tuple[Field, ...]:
    """Every setting, in schema order."""
    return tuple(field for section, struct in sections().items() for field in _section_fields(section, struct))


@functools.cache
def by_key() -> dict[str, Field]:
    """All settings, by key (`server.port`)."""
    return {field.key: field for field in fields()}


@functools.cache
def by_name() -> dict[str, Field]:
    """Field name → field; names are unique over the sections."""
    return {field.name: field for field in fields()}


@functools.cache
def by_env() -> dict[str, Field]:
    """All settings, by environment variable."""
    return {field.env: field for field in fields()}


def _section_fields(section: str, struct: type[Struct]) -> list[Field]:
    hints = get_type_hints(struct, include_extras=True)
    found = []
    for raw in msgspec.structs.fields(struct):
        base, metas, optional, choices = _unwrap(hints[raw.name])
        extra = {key: value for meta in metas for key, value in (meta.extra or {}).items()}
        examples = [example for meta in metas for example in meta.examples or ()]
        found.append(
            Field(
                section=section,
                name=raw.encode_name,
                type=hints[raw.name],
                default=raw.default,
                doc=next((meta.description for meta in metas if meta.description), ""),
                base=base,
                unit=extra.get("unit"),
                optional=optional,
                choices=choices,
                limits=metas,
                secret=bool(extra.get("secret")),
                example=examples[0] if examples else raw.default,
            )
        )
    return found


def _unwrap(hint: Any) -> tuple[Any, tuple[Meta, ...], bool, tuple[str, ...]]:
    """The bare type, every `Meta` on the way to it, whether None is allowed, and a Literal's values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, metas, optional, choices = _unwrap(args[0])
        return base, (*args[1:], *metas), optional, choices
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        base, metas, _, choices = _unwrap(inner)
        return base, metas, True, choices
    if origin is Literal:
        return str, (), False, args
    return origin or hint, (), False, ()
