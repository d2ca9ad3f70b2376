"""Changes to a recipe by the paths of its keys, and a recipe's values back to YAML."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from runtime.errors import InvalidRequest
from runtime.trainer.recipe.document import read_document
from runtime.trainer.recipe.types import plain

SHORT_NAMES: Mapping[str, str] = {
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}
"""Short name of a key, for people who type it → the key."""
MAX_CHANGES = 100
MAX_BYTES = 64 * 1024
"""Bytes of all changes, as JSON."""

_STEP = re.compile(r"([A-Za-z_]\w*)((?:\[\d{1,4}\])*)")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts that `read_document` would read as something else with quotes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    bare = plain(text) == text and isinstance(plain(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if bare else '"')


_Dumper.add_representer(str, _text)


def write_document(values: Mapping[str, Any]) -> bytes:
    """A recipe's values as YAML, in their order."""
    text = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return str(text).encode()


def changed_recipe(recipe: bytes, changes: Mapping[str, Any]) -> bytes:
    """The recipe with values set by paths (`learning_rate`, `publish.when`, `datasets[0].split`); None takes a key out.

    Keys are checked later, with the whole recipe. Raises `InvalidRequest` for a path that leads nowhere.
    """
    if len(changes) > MAX_CHANGES:
        raise InvalidRequest(f"set has {len(changes)} changes; at most {MAX_CHANGES} are allowed.", param="set")
    size = len(msgspec.json.encode(changes))
    if size > MAX_BYTES:
        raise InvalidRequest(f"set has {size} bytes; at most {MAX_BYTES} are allowed.", param="set")
    values = read_document(recipe).values
    for path, value in changes.items():
        _set(values, SHORT_NAMES.get(path, path), value)
    try:
        return write_document(values)
    except RecursionError:
        raise InvalidRequest("set is nested too deep.", param="set") from None


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    place: Any = values
    steps = _steps(path)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        missing = isinstance(step, int) and not (isinstance(place, list) and step < len(place))
        if missing or (isinstance(step, str) and not isinstance(place, dict)):
            raise InvalidRequest(f"set: the recipe has no {path[:100]!r}.", param=f"set.{path[:100]}")
        if following is None:
            _put(place, step, value)
        elif isinstance(step, str) and place.get(step) is None and isinstance(following, str):
            place[step] = {}
            place = place[step]
        else:
            place = place.get(step) if isinstance(place, dict) else place[step]


def _put(place: Any, step: str | int, value: Any) -> None:
    if value is None and isinstance(place, dict):
        place.pop(step, None)
    else:
        place[step] = value


def _steps(path: str) -> list[str | int]:
    found: list[str | int] = []
    for part in path.split("."):
        match = _STEP.fullmatch(part)
        if match is None:
            raise InvalidRequest(
                f"set: {path[:100]!r} is no path of a key, such as learning_rate or datasets[0].split.",
                param=f"set.{path[:100]}",
            )
        found += [match[1], *map(int, re.findall(r"\d+", match[2]))]
    return found


def flat_keys(values: Any, path: str = "") -> dict[str, Any]:
    """Path of each value that is no mapping or list → the value."""
    if isinstance(values, dict):
        parts = [(f"{path}.{name}" if path else name, value) for name, value in values.items()]
    elif isinstance(values, list):
        parts = [(f"{path}[{index}]", value) for index, value in enumerate(values)]
    else:
        return {path: values}
    return {name: value for inner, part in parts for name, value in flat_keys(part, inner).items()}
