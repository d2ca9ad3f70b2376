"""Readers of a config.json. Their errors name the wrong key, its value and the expected one.

A model's configuration comes from any source and is edited by hand. An unchecked value ends in a traceback, or worse,
in a model that loads and fails at each request.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

Config = Mapping[str, Any]
T = TypeVar("T")

MAX_INTEGER = 2**31 - 1
MAX_COUNT = 4096
"""Largest number of layers, heads or experts: each is an object or more."""
MIN_FACTOR, MAX_NUMBER = 1e-9, 1e12
"""Smallest factor or divisor, and largest number of any kind. Values outside make the output infinite or NaN, which
would fail each request."""
SHOWN_CHARACTERS = 60


class _Required:
    """Default of a required key."""


REQUIRED: Final = _Required()


class ConfigError(ValueError):
    """Unusable value in a model's configuration."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as written in the file, cut to fit on a line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def integer(
    config: Config,
    key: str,
    default: int | _Required = REQUIRED,
    *,
    at_least: int = 1,
    at_most: int = MAX_INTEGER,
    where: str = "",
) -> int:
    """An integer. `default` is for an absent key; null is no integer. `where`: the object that holds the key. Raises
    `ConfigError`."""
    value = _get(config, key, default, _integers(at_least, at_most), where)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(where + key, value, _integers(at_least, at_most))
    if value > at_most:
        raise ConfigError(where + key, value, f"at most {at_most}")
    return value


def optional_integer(
    config: Config, key: str, default: int | None = None, *, at_least: int = 1, at_most: int = MAX_INTEGER
) -> int | None:
    """An integer, or None where the key is null."""
    if config.get(key, default) is None:
        return None
    return integer(config, key, REQUIRED if default is None else default, at_least=at_least, at_most=at_most)


def count(config: Config, key: str, default: int | _Required = REQUIRED) -> int:
    """A number of layers, heads or experts."""
    return integer(config, key, default, at_most=MAX_COUNT)


def number(
    config: Config,
    key: str,
    default: float | _Required = REQUIRED,
    *,
    at_least: float = -MAX_NUMBER,
    at_most: float = MAX_NUMBER,
    where: str = "",
) -> float:
    """A number. Arguments and errors as for `integer`."""
    expected = f"a number from {at_least:g} to {at_most:g}"
    value = _get(config, key, default, expected, where)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not at_least <= value <= at_most:  # NaN fails every comparison
        raise ConfigError(where + key, value, expected)
    return float(value)


def optional_number(
    config: Config,
    key: str,
    default: float | None = None,
    *,
    at_least: float = -MAX_NUMBER,
    at_most: float = MAX_NUMBER,
    where: str = "",
) -> float | None:
    """A number, or None where the key is null."""
    if config.get(key, default) is None:
        return None
    fallback = REQUIRED if default is None else default
    return number(config, key, fallback, at_least=at_least, at_most=at_most, where=where)


def flag(config: Config, key: str, default: bool, *, where: str = "") -> bool:
    """true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(where + key, value, "true or false")
    return value


def text(config: Config, key: str, default: str | _Required = REQUIRED, *, choices: Collection[str] = ()) -> str:
    """A text, one of `choices` where there are any."""
    expected = f"one of {', '.join(sorted(choices))}" if choices else "a text"
    value = _get(config, key, default, expected, "")
    if not isinstance(value, str) or (choices and value not in choices):
        raise ConfigError(key, value, expected)
    return value


def items(config: Config, key: str, *, length: int | None = None, where: str = "") -> Sequence[Any] | None:
    """A list, or None where the key is null or absent."""
    value = config.get(key)
    if value is None:
        return None
    expected = "a list" if length is None else f"a list of {length} entries"
    if not isinstance(value, list | tuple):
        raise ConfigError(where + key, value, expected)
    if length is not None and len(value) != length:
        raise ValueError(f"{where}{key} must have {length} entries, got {len(value)}")
    return value


def table(config: Config, key: str) -> dict[str, Any]:
    """An object; empty where the key is null or absent."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(key, value, "an object or null")
    return dict(value or {})


def architectures(config: Config) -> list[str]:
    """The names of a model's classes in transformers."""
    found = items(config, "architectures") or []
    if not all(isinstance(name, str) for name in found):
        raise ConfigError("architectures", config["architectures"], "a list of names")
    return list(found)


def _get(config: Config, key: str, default: object, expected: str, where: str) -> Any:
    value = config.get(key, default)
    if isinstance(value, _Required):
        raise ValueError(f"{where}{key} must be {expected}, and is missing")
    return value


def _integers(at_least: int, at_most: int) -> str:
    if at_most == MAX_INTEGER:
        return f"an integer above {at_least - 1}"
    return f"an integer from {at_least} to {at_most}"


# -- errors ----------------------------------------------------------------------------------------
#
# The error of every loader.


class ModelLoadError(Exception):
    """The model cannot be loaded. The message names the problem, the file and the remedy."""


# -- JSON files ------------------------------------------------------------------------------------
#
# Reading the JSON files of a model directory.


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelLoadError` where the file is absent, unreadable or no object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a bad encoding is a ValueError too
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but empty when the file does not exist."""
    return read_json_object(path) if path.is_file() else {}
