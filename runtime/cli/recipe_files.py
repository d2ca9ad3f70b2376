"""What `eft train` sends: the recipe's bytes, and the data files that it names and that are on this machine.

Knows only the few keys that name files. Whether the recipe is right is the server's to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runtime.cli.errors import UsageError


@dataclass(frozen=True)
class RecipeFiles:
    recipe: bytes
    data: dict[str, Path]
    """As the recipe calls it → where it is."""


def read_recipe(path: Path, *, name: str | None = None) -> RecipeFiles:
    """The recipe at `path`, under another adapter name where one is given. Raises `UsageError`."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid UTF-8 at byte {error.start}") from error
    try:
        if name is not None:
            text = _with_name(text, name)
        keys = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        keys = None  # the server says what is wrong with it, and where
    found = {}
    for wanted in _names(keys if isinstance(keys, dict) else {}):
        place = _find(wanted, path.parent)
        if place is not None:
            found[wanted] = place
    return RecipeFiles(text.encode(), found)


def _names(keys: dict[Any, Any]) -> Iterator[str]:
    """Everything in the recipe that may be a file's name."""
    for section in ("datasets", "test_datasets"):
        entries = keys.get(section)
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, dict):
                continue
            path, files = entry.get("path"), entry.get("data_files")
            files = files if isinstance(files, list) else [files]
            candidates = [path, *files, *(f"{path}/{file}" for file in files if isinstance(file, str))]
            yield from (candidate for candidate in candidates if isinstance(candidate, str) and candidate)


def _find(name: str, folder: Path) -> Path | None:
    """The file in the working directory, or else beside the recipe."""
    for place in (Path(name), folder / name):
        try:
            if place.is_file():
                return place
        except OSError:  # too long to be a path
            return None
    return None


def _with_name(text: str, name: str) -> str:
    """`text` with its top-level key `name` set, and every other character as it is."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    quoted = "'" + name.replace("'", "''") + "'"
    if root is None:
        return f"name: {quoted}\n{text}"
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise UsageError("--name works for recipes that are a block of `key: value` lines")
    for key, value in root.value:
        if key.value == "name":
            start, end = value.start_mark.index, value.end_mark.index
            line_break = "\n" if text[start:end].endswith("\n") else ""  # a block of text ends with its line
            return text[:start] + quoted + line_break + text[end:]
    start = root.start_mark.index
    return f"{text[:start]}name: {quoted}\n{text[start:]}"
