"""Files that a recipe may read: the uploads, and the files under the data roots. No others, by any path.

Paths in messages are as the recipe gives them: messages do not reveal their place on the server.
"""

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import iglob
from io import BufferedReader
from itertools import islice
from pathlib import Path

from runtime.errors import Forbidden, InvalidRequest
from runtime.support.durable import TOO_MANY_FILES, open_without_links, storage_unavailable
from settings.suggest import nearest

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
_PATTERN = re.compile(r"[*?[]")
_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".ndjson")
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
MAX_MATCHES = 1000
"""Most files that one pattern stands for."""
MAX_LISTED = 1000
"""Entries of a folder among which the nearest name is looked for."""


@dataclass(frozen=True)
class DataFile:
    """A file that may be read."""

    name: str
    """As the recipe calls it."""
    path: Path
    """Absolute, without symbolic links."""

    def open(self) -> BufferedReader:
        """Open the file for reading. Raises `Forbidden` unless it is a regular file, `InvalidRequest` when it cannot be
        read, and `StorageUnavailable` where the system has no descriptor left."""
        try:
            descriptor = open_without_links(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise storage_unavailable(f"{self.name} cannot be read now", error) from error
            raise InvalidRequest(f"{self.name} cannot be read: {error.strerror}.", param="datasets") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Forbidden(f"{self.name} is not a regular file.")
        return os.fdopen(descriptor, "rb")


class DataFiles:
    """The files that one job may read."""

    def __init__(
        self,
        uploads: Mapping[str, Path] | None = None,
        roots: Sequence[Path] = (),
        named: Iterable[str] = (),
        *,
        hub: bool = False,
    ) -> None:
        """`uploads`: name in the request → stored path. `named`: every file that the recipe names, to find out if the
        base name of one is unambiguous. `hub`: data sets of a hub may be fetched."""
        self._hub = hub
        self.uploads = dict(uploads or {})
        self.roots = tuple(roots)
        self._named = {_plain(name) for name in named}
        self._used: set[str] = set()

    @property
    def unused(self) -> list[str]:
        """Files that were sent along, and were not used so far."""
        return [name for name in self.uploads if name not in self._used]

    def naming(self, named: Iterable[str]) -> "DataFiles":
        """The same files, for a recipe that names these."""
        return DataFiles(self.uploads, self.roots, named, hub=self._hub)

    def is_hub(self, name: str) -> bool:
        """True for the id of a hub's data set that may be fetched, where no file or folder has this name."""
        if not self._hub or not _HUB_ID.fullmatch(name) or Path(name).suffix in _ENDINGS or self._sent(name):
            return False
        return not self._has_folder(posixpath.dirname(name)) and not self._has_folder(name)

    def find(self, name: str, *, param: str = "datasets") -> DataFile:
        """The file that a recipe calls `name`: one that was sent under that name, or, where there is one alone, under
        its base name, as curl sends `-F file=@data/x.jsonl`; else one under a data root.

        Raises `Forbidden` (403) for everything outside, whether it exists or not, and `InvalidRequest` for what is
        not there.
        """
        sent = self._sent(name)
        if len(sent) == 1:
            self._used.add(sent[0])
            return DataFile(name, self.uploads[sent[0]].resolve())
        if "\0" in name or _URL.match(name):
            raise self._forbidden(name, "Data is not fetched from other places.", param)
        outside = False
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
        if sent:
            raise InvalidRequest(self._ambiguous(name, sent), param=param, code="data_not_found")
        if _FILE_ID.fullmatch(name):
            raise InvalidRequest(
                f"{name} is no file of /v1/files that this key may read.", param=param, code="data_not_found"
            )
        if outside or _leads_out(name):
            raise self._forbidden(name, "", param)
        if _HUB_ID.fullmatch(name) and not Path(name).suffix and not self._has_folder(posixpath.dirname(name)):
            raise self._forbidden(
                name, "Data sets of a hub are fetched where the setting trainer.hub allows it.", param
            )
        raise InvalidRequest(
            f"{name} is missing: it is neither among the files sent along ({self._shown()}) nor under a data root"
            f"{self._hint(name)}. {_ways_out(name)}",
            param=param,
            code="data_not_found",
        )

    def find_all(self, name: str, *, param: str = "datasets") -> list[DataFile]:
        """The files that a recipe calls `name`, which may be a pattern with `*`, `?` and `[…]`: files that were sent,
        or else those under a data root, in the order of their names. Raises as `find`, and `InvalidRequest` for more
        than `MAX_MATCHES`."""
        if not _PATTERN.search(name) or name in self.uploads:
            return [self.find(name, param=param)]
        plain = _plain(name)
        found = [sent for sent in self.uploads if _matches(_plain(sent), plain)]
        found = found or [sent for sent in self.uploads if fnmatchcase(sent, posixpath.basename(plain))]
        if not found and not _leads_out(name):
            roots = [os.path.realpath(root) for root in self.roots]
            matches = (islice(iglob(plain, root_dir=root), MAX_MATCHES + 1) for root in roots)
            found = next((some for some in map(list, matches) if some), [])
        if len(found) > MAX_MATCHES:
            raise InvalidRequest(f"{name[:200]} stands for more than {MAX_MATCHES} files.", param=param)
        return [self.find(one, param=param) for one in sorted(found)] or [self.find(name, param=param)]

    def _sent(self, name: str) -> list[str]:
        """The uploads that `name` may mean: one, where that is clear; more, where it is not."""
        if name in self.uploads:
            return [name]
        plain, base = _plain(name), posixpath.basename(name)
        for sent in self.uploads:
            if _plain(sent) == plain:
                return [sent]
        sent_as = {_plain(sent) for sent in self.uploads}
        alike = [sent for sent in self.uploads if posixpath.basename(sent) == base and _plain(sent) not in self._named]
        rivals = [other for other in self._named - sent_as - {plain} if posixpath.basename(other) == base]
        return [*alike, *rivals] if alike and base else []

    def _ambiguous(self, name: str, alike: Sequence[str]) -> str:
        names = ", ".join(sorted({name, *alike})[:4])
        return (
            f"{name}: it is not clear which of the files sent along that is ({names}: one base name). Send each under "
            f"the path that the recipe has (curl: -F {name[:100]}=@FILE)."
        )

    def _has_folder(self, folder: str) -> bool:
        """True if a folder of this name is under a data root, or in the name of a file that was sent."""
        sent = any(posixpath.dirname(name) == folder for name in self.uploads)
        modes = (_mode(Path(root) / folder) for root in self.roots)
        return sent or any(mode is not None and stat.S_ISDIR(mode) for mode in modes)

    def _hint(self, name: str) -> str:
        """The nearest name, among what was sent and what is where the file should be."""
        folder, base = posixpath.split(name)
        found = {posixpath.basename(sent): sent for sent in self.uploads}
        for root in self.roots:
            found |= {entry: entry for entry in _entries(Path(root))}
            if folder and not _leads_out(name):
                found |= {entry: f"{folder}/{entry}" for entry in _entries(Path(root) / folder)}
        near = nearest(base, found)
        return f" (did you mean {found[near][:200]}?)" if near is not None else ""

    def _shown(self) -> str:
        return ", ".join(name[:100] for name in sorted(self.uploads)[:10]) or "none"

    def _forbidden(self, name: str, why: str, param: str) -> Forbidden:
        shown = name if len(name) <= 200 else name[:197] + "…"
        near = nearest(posixpath.basename(name), {posixpath.basename(sent): sent for sent in self.uploads})
        hint = f" Among the files sent along is {near[:100]}." if near is not None else ""
        head = f"{shown!r} was not sent along, and may not be read from the server.{hint}"
        return Forbidden(" ".join(filter(None, [head, why, _ways_out(shown)])), param=param)


def _matches(path: str, pattern: str) -> bool:
    """True if a pattern stands for a path; no `*` stands for a `/`."""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def _ways_out(name: str) -> str:
    """Advice about a file that may not, or cannot, be read."""
    return (
        f"Send it along with the recipe (`eft train` does; curl: -F recipe=@recipe.yml -F file=@{name}), or put it "
        "under one of the server's data roots (trainer.data_roots)."
    )


def _plain(name: str) -> str:
    """A path without `./` and the like."""
    return posixpath.normpath(name) if name else name


def _leads_out(name: str) -> bool:
    """True if a path is not below the folder that it starts from, or is no path at all."""
    plain = _plain(name)
    return plain.startswith(("/", "../")) or plain == ".." or len(name) > 4096


def _entries(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in islice(entries, MAX_LISTED))
    except (OSError, ValueError):
        return


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except OSError:
        return None
