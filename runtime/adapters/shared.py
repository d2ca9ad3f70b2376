"""The shared store of adapters: versions that never change, and for each name the revisions of what it means.

    versions/NAME/N/…              a version's files, and manifest.json, written last, with their checksums
    names/NAME/000000000007.json   what the name means since its 7th change; the highest revision counts

A revision is written only where there is none of its number, so of two servers that change a name at once one has to
read the other's change first, and no version is lost. A version that no revision names is invisible: an upload that was
cut off leaves one, and its number is never used again.
"""

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.adapters.shared_objects import SharedObjects, check_conditional_writes
from runtime.adapters.store import NameRecord, Version, name_problem
from runtime.adapters.versions import RECORD, digest_of
from runtime.checkpoints.peft import FILES, AdapterInvalid
from runtime.support.durable import fresh_directory, write_file
from runtime.support.failpoints import failpoint

MANIFEST = "manifest.json"


class SharedName(Struct, frozen=True, kw_only=True):
    """One revision of a name."""

    revision: int
    """From 1, rising by 1."""
    record: NameRecord
    versions: tuple[Version, ...] = ()

    @property
    def keys(self) -> set[str]:
        """Keys of its versions."""
        return {version.key for version in self.versions}


class SharedStore:
    """The store as servers use it. All methods block, and raise `OSError` when it cannot be reached."""

    def __init__(self, objects: SharedObjects) -> None:
        self._objects = objects

    def check(self) -> None:
        """Raise `ConditionalWritesMissing` where changes of several servers would be lost in this store."""
        check_conditional_writes(self._objects)

    def revisions(self) -> dict[str, int]:
        """Every name with the number of its newest revision."""
        newest: dict[str, int] = {}
        for path in self._objects.list("names"):
            _, name, file = path.split("/", 2)
            number = file.removesuffix(".json")
            if number.isdigit() and name_problem(name) is None:
                newest[name] = max(newest.get(name, 0), int(number))
        return newest

    def read(self, name: str, revision: int) -> SharedName:
        """A revision that `revisions` told of. Raises `AdapterInvalid` where it is not whole."""
        try:
            found = msgspec.json.decode(self._objects.read(_revision_path(name, revision)), type=SharedName)
        except msgspec.MsgspecError as error:
            raise AdapterInvalid(f"revision {revision} of {name!r} in the shared store cannot be read") from error
        if found.record.name != name or found.revision != revision or any(v.name != name for v in found.versions):
            raise AdapterInvalid(f"revision {revision} of {name!r} in the shared store is of another name")
        return found

    def newest(self, name: str) -> SharedName | None:
        """The newest revision of a name; None where the store does not have the name."""
        numbers = [
            int(path.rpartition("/")[2].removesuffix(".json"))
            for path in self._objects.list(f"names/{name}")
            if path.endswith(".json")
        ]
        return self.read(name, max(numbers)) if numbers else None

    def write(self, shared: SharedName) -> bool:
        """Write a revision. False where another server has written one of this number."""
        failpoint("shared.before_revision", shared.record.name)
        path = _revision_path(shared.record.name, shared.revision)
        return self._objects.create(path, msgspec.json.format(msgspec.json.encode(shared)))

    def upload(self, version: Version, folder: Path) -> None:
        """Write the files of a version, which no revision names yet; what is there already is left as it is."""
        place = _version_path(version.name, version.number)
        manifest: dict[str, str] = {}
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            manifest[path.name] = hashlib.sha256(data).hexdigest()
            self._objects.create(f"{place}/{path.name}", data)
            failpoint("shared.in_upload", f"{version.id}/{path.name}")
        self._objects.create(f"{place}/{MANIFEST}", msgspec.json.encode(manifest))

    def download(self, version: Version, folder: Path) -> None:
        """Bring a version's files to `folder`, which must not exist, checked and on the disk. Raises
        `AdapterInvalid` where they are not the published ones."""
        place = _version_path(version.name, version.number)
        try:
            manifest = msgspec.json.decode(self._objects.read(f"{place}/{MANIFEST}"), type=dict[str, str])
            files = {name: self._objects.read(f"{place}/{name}") for name in manifest if _is_plain(name)}
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            raise AdapterInvalid(f"{version.id} is not whole in the shared store") from error
        wrong = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != manifest[name]]
        if wrong or not {*FILES, RECORD} <= files.keys() or digest_of(files) != version.sha256:
            raise AdapterInvalid(f"{version.id} in the shared store is not what was published: {wrong or 'its files'}")
        with fresh_directory(folder) as partial:
            for name, data in files.items():
                write_file(partial / name, data)

    def remove(self, version: Version) -> None:
        """Delete the files of a version that no revision names any more."""
        self._objects.remove(_version_path(version.name, version.number))


def _is_plain(name: str) -> bool:
    return name == Path(name).name and not name.startswith(".")


def _revision_path(name: str, revision: int) -> str:
    return f"names/{name}/{revision:012}.json"


def _version_path(name: str, number: int) -> str:
    return f"versions/{name}/{number}"
