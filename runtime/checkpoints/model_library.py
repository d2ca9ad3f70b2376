"""Whole models that jobs have trained, as versions of a name: `models/NAME/N` in the state directory.

Each version is a model directory as transformers writes it, with a record of where it comes from. A version is written
under a temporary name, synced and renamed, and never changed.
"""

import os
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from runtime.support.durable import fresh_directory, make_directory, sync_file, write_file

RECORD = "eft-model.json"
FOLDER = "models"
_LABEL = re.compile(r"(?P<name>[A-Za-z0-9][\w.:-]*)@(?P<number>[1-9][0-9]{0,8})", re.ASCII)


class ModelRecord(Struct, frozen=True, kw_only=True):
    """Origin of a version."""

    job: str
    step: int
    metrics: dict[str, Any]
    base: str
    """Name of the model that the job was trained on."""
    created: float
    """Seconds since the epoch."""


class ModelLibrary:
    """The models of one state directory. Blocks."""

    def __init__(self, state: Path) -> None:
        self._root = state / FOLDER

    def find(self, label: str) -> Path | None:
        """The directory of `name@3`; None where there is none."""
        match = _LABEL.fullmatch(label)
        path = None if match is None or ".." in match["name"] else self._root / match["name"] / match["number"]
        return path if path is not None and (path / RECORD).is_file() else None

    def labels(self) -> list[str]:
        """Every version of every name, as `name@3`, by name and number."""
        found = [(path.parent.parent.name, path.parent.name) for path in self._root.glob(f"*/*/{RECORD}")]
        return [f"{name}@{number}" for name, number in sorted((n, int(v)) for n, v in found if v.isdigit())]

    def versions(self, name: str) -> dict[int, ModelRecord]:
        """The versions of a name, by number. Those that cannot be read are left out."""
        found = {}
        for path in sorted((self._root / name).glob("*/" + RECORD)):
            if path.parent.name.isdigit():
                found[int(path.parent.name)] = msgspec.json.decode(path.read_bytes(), type=ModelRecord)
        return found

    def publish(self, name: str, source: Path, record: ModelRecord) -> str:
        """Make the files of `source`, which are never changed, the newest version of `name`; returns its label. A job
        publishes once: again, it gets the version that is there. Raises `OSError`."""
        known = self.versions(name)
        for number, published in known.items():
            if published.job == record.job:
                return f"{name}@{number}"
        number = max(known, default=0) + 1
        make_directory(self._root / name)
        with fresh_directory(self._root / name / str(number)) as folder:
            for path in sorted(source.iterdir()):
                os.link(path, folder / path.name)
                sync_file(folder / path.name)
            write_file(folder / RECORD, msgspec.json.encode(record))
        return f"{name}@{number}"
