"""Files that `eft train` sends: the recipe, and the data files that it names and that are on this machine.

Reads only the few keys that name files. The server checks the recipe.
"""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from runtime.cli.output import UsageError
from settings.suggest import nearest

_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".ndjson")
_MAX_EXAMPLES = 3

MAX_LISTED = 1000
"""Most entries of a folder among which the nearest name is searched."""


@dataclass(frozen=True)
class RecipeFiles:
    """A recipe and the data files that go with it."""

    recipe: bytes
    data: dict[str, Path]
    """Name in the recipe → path of the file."""
    missing: dict[str, str | None] = field(default_factory=dict)
    """Name in the recipe of a missing file → the nearest existing path, if any."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Name in the recipe → path, for folders on this machine."""

    stand_ins: tuple[str, ...] = ()
    """Names in `data` whose file is not at the path in the recipe."""

    @property
    def notices(self) -> Iterator[str]:
        """A notice for each file that is sent in place of a path in the recipe."""
        for name in self.stand_ins:
            yield f"{name} is not there: {self.data[name]}, which has its name, is used"

    def explain(self, message: str) -> str:
        """A refusal, with notes on the files that it names."""
        lines = [message]
        for name, near in self.missing.items():
            if name in message:
                hint = f"; did you mean {near}?" if near else ""
                lines.append(f"{name} is neither in the working directory nor beside the recipe{hint}")
        for name, folder in self.folders.items():
            if message.startswith((f"{name} is missing", f"{name!r} was not sent")):
                files = _data_files(folder)
                example = f", such as data_files: [{', '.join(files)}]" if files else ""
                lines.append(f"{folder} is a folder: name the files in it that are the data{example}")
        return "\n".join(lines)


def read_recipe(path: Path, *, name: str | None = None) -> RecipeFiles:
    """The recipe at `path`, under another adapter name if one is given. Raises `UsageError`."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid UTF-8 at byte {error.start}") from error
    try:
        if name is not None:
            text = _with_name(text, name)
        keys = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        keys = None  # the server reports the error and its place
    wanted = list(dict.fromkeys(_names(keys if isinstance(keys, dict) else {})))
    found, missing, folders = dict[str, Path](), dict[str, str | None](), dict[str, Path]()
    stand_ins = list[str]()
    matches = {match for one in wanted for match in _matches(one, path.parent)}
    for one in [*wanted, *sorted(matches.difference(wanted))]:
        if (place := _find(one, path.parent)) is not None:
            found[one] = place
        elif (place := _by_base_name(one, wanted, path.parent)) is not None:
            found[one] = place
            stand_ins.append(one)
        elif (place := _find(one, path.parent, Path.is_dir)) is not None:
            folders[one] = place
        elif Path(one).suffix:
            missing[one] = _nearest(one, path.parent)
    return RecipeFiles(text.encode(), found, missing, folders, tuple(stand_ins))


def _names(keys: dict[Any, Any]) -> Iterator[str]:
    """All values in the recipe that may name a file."""
    for section in ("datasets", "test_datasets", "generation_datasets", "pretraining_dataset"):
        entries = keys.get(section)
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                continue
            path, files = entry.get("path"), entry.get("data_files")
            files = files if isinstance(files, list) else [files]
            candidates = [path, *files, *(f"{path}/{file}" for file in files if isinstance(file, str))]
            yield from (candidate for candidate in candidates if isinstance(candidate, str) and candidate)


def _matches(pattern: str, folder: Path) -> list[str]:
    """Names of the files that a pattern stands for, in the working directory, or else beside the recipe."""
    if not glob.has_magic(pattern):
        return []
    try:
        places = (glob.glob(pattern), glob.glob(pattern, root_dir=folder))
        return next((sorted(found)[:MAX_LISTED] for found in places if found), [])
    except (OSError, ValueError):
        return []


def _find(name: str, folder: Path, fits: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """Path that `fits` (default: a file), in the working directory, or else beside the recipe; None without one."""
    try:
        places = (Path(name).expanduser(), folder / name)
        return next((place for place in places if fits(place)), None)
    except (OSError, ValueError, RuntimeError):  # too long to be a path, no path at all, no such user
        return None


def _by_base_name(name: str, wanted: list[str], folder: Path) -> Path | None:
    """The file of the same base name beside the recipe, if only one name in the recipe has that base name."""
    base = os.path.basename(name)
    if not base or base == name or any(other != name and os.path.basename(other) == base for other in wanted):
        return None
    return _find(base, folder)


def _nearest(name: str, folder: Path) -> str | None:
    """The existing path nearest to a missing one, in the folders where it is searched."""
    parent, base = os.path.split(name)
    found: dict[str, str] = {}
    for place in (folder, Path(), folder / parent, Path(parent)):
        try:
            with os.scandir(place) as entries:
                found |= {entry.name: os.path.normpath(place / entry.name) for entry in islice(entries, MAX_LISTED)}
        except (OSError, ValueError):
            continue
    near = nearest(base, found)
    return None if near is None else found[near]


def _data_files(folder: Path) -> list[str]:
    """Names of some data files in a folder."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, MAX_LISTED))
    except OSError:
        return []
    return [name for name in names if name.endswith(_ENDINGS)][:_MAX_EXAMPLES]


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
