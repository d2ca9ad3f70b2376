"""Which files a recipe may read: those sent along, and those under the data roots. No others, by any way.

Paths in messages are as the recipe gives them: where they lie on the server is not told.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from runtime.errors import Forbidden, InvalidRequest

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
_WORKS = "Send the file along with the recipe, or put it under one of the server's data roots (trainer.data_roots)."


@dataclass(frozen=True)
class DataFile:
    """A file that may be read."""

    name: str
    """As the recipe calls it."""
    path: Path
    """Absolute, without symbolic links."""

    def open(self) -> BinaryIO:
        """Raises `Forbidden` for what is no regular file, and `InvalidRequest` for what cannot be read."""
        try:
            # Neither a link that was put there since, nor a pipe that blocks, nor a device.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidRequest(f"{self.name} cannot be read: {error.strerror}.", param="datasets") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Forbidden(f"{self.name} is not a regular file.")
        return os.fdopen(descriptor, "rb")


@dataclass(frozen=True)
class DataFiles:
    """The files that one job may read."""

    uploads: Mapping[str, Path] = field(default_factory=dict)
    """Name in the request → where it was stored."""
    roots: Sequence[Path] = ()

    def find(self, name: str, *, param: str = "datasets") -> DataFile:
        """The file that a recipe calls `name`. Raises `Forbidden` (403) for everything outside, whether it
        exists or not, and `InvalidRequest` for what is not there."""
        if name in self.uploads:
            return DataFile(name, self.uploads[name].resolve())
        if "\0" in name or _URL.match(name):
            raise _forbidden(name, "Data is not fetched from other places.", param)
        outside = not self.roots and not self.uploads
        for root in self.roots:
            base = os.path.realpath(root)
            path = Path(os.path.realpath(os.path.join(base, name)))
            if not path.is_relative_to(base):
                outside = True
            elif (mode := _mode(path)) is not None:
                if stat.S_ISDIR(mode):
                    message = f"{name} is a folder: name its files in data_files."
                    raise InvalidRequest(message, param=param, code="data_not_found")
                return DataFile(name, path)
        if outside or not Path(name).suffix:
            raise _forbidden(name, "Data sets of a hub are not fetched." if _HUB_ID.fullmatch(name) else "", param)
        sent = ", ".join(sorted(self.uploads)[:10]) or "none"
        raise InvalidRequest(
            f"{name} is neither among the files sent along ({sent}) nor under a data root. {_WORKS}",
            param=param,
            code="data_not_found",
        )


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except OSError:
        return None


def _forbidden(name: str, why: str, param: str) -> Forbidden:
    shown = name if len(name) <= 200 else name[:197] + "…"
    return Forbidden(" ".join(filter(None, [f"{shown!r} may not be read.", why, _WORKS])), param=param)
