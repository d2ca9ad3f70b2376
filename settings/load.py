"""Settings from flags, environment and file, with the origin of every value.

Precedence: flag > environment (`EFT_<SECTION>_<FIELD>`) > TOML file > default. Every value given is
checked, also one that another overrides: a mistake does not lie in wait until the flag is gone.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from settings import fields, sources, values
from settings.errors import SettingsError
from settings.schema import Settings
from settings.sources import Given
from settings.suggest import hint

__all__ = ["Loaded", "SettingsError", "load"]


class Loaded(Struct, frozen=True):
    """The settings, and where each came from ("flag --port", "environment …", "file …", "default")."""

    settings: Settings
    origins: dict[str, str]
    """By key: "section.field"."""
    file: Path | None = None
    """The TOML file that was read."""


def load(
    *,
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Loaded:
    """Read and merge all settings. Raises `SettingsError` with every problem found.

    `flags` maps field names to values; a string is read as text with units, None means not given.
    `file` is the TOML file; without one, EFT_CONFIG names it, else `./eft.toml` is read where it exists.
    """
    problems: list[str] = []
    path = sources.locate(env, file)
    layers = [
        sources.read_file(path, problems) if path else [],
        sources.read_env(env, problems),
        _read_flags(flags or {}, problems),
    ]
    merged: dict[str, dict[str, Any]] = {section: {} for section in fields.sections()}
    origins = {field.key: "default" for field in fields.fields()}
    for given in (item for layer in layers for item in layer):  # the later layer wins
        try:
            value = _convert(given)
        except ValueError as error:
            problems.append(f"{given.field.key} ({given.origin}): {error}")
            continue
        merged[given.field.section][given.field.name] = value
        origins[given.field.key] = given.origin
    if problems:
        raise SettingsError(problems)
    built: dict[str, Any] = {section: struct(**merged[section]) for section, struct in fields.sections().items()}
    return Loaded(Settings(**built), origins, path)


def _convert(given: Given) -> Any:
    return (values.from_text if given.is_text else values.from_value)(given.field, given.raw)


def _read_flags(flags: Mapping[str, object], problems: list[str]) -> list[Given]:
    given = []
    for name, raw in flags.items():
        if raw is None:
            continue
        if field := fields.by_name().get(name):
            # A list comes from a flag given several times: its items are whole, commas and all.
            given.append(Given(field, f"flag {field.flag}", raw, is_text=isinstance(raw, str)))
        else:
            flag = "--" + name.replace("_", "-")
            problems.append(f"flag {flag}: unknown setting{hint(name, fields.by_name())}")
    return given
