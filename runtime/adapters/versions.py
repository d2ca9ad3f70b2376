"""Versions on the disk and in memory: their folders, the records beside their files, and those that can be named."""

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from runtime.adapters.card import Card, read_card, read_tokens, write_card
from runtime.adapters.store import NameRecord, Version
from runtime.checkpoints.peft import FILES, AdapterInvalid, read_adapter, read_files
from runtime.errors import AdapterUnavailable
from runtime.metrics import Metrics
from runtime.model.lora import Adapter
from runtime.model.lora_base import LoraBase
from runtime.support.durable import (
    PARTIAL,
    TOO_MANY_FILES,
    fresh_directory,
    make_directory,
    reason,
    remove,
    replace_file,
    storage_unavailable,
    write_file,
)
from runtime.support.logs import get_logger
from runtime.support.state_directory import LostFound

VersionSource = Path | Callable[[Path], None]
"""A folder with an adapter's files, or a function that writes them to a folder that does not exist yet."""

RECORD = "version.json"
"""File beside the others in a version's folder: a copy of its row, for the case that the row is lost."""

_log = get_logger("adapters")


def stage(
    source: VersionSource,
    directory: Path,
    base: LoraBase,
    describe: Callable[[int, str], bytes],
    *,
    max_rank: int,
    max_vocabulary: int | None = None,
) -> None:
    """Bring an adapter's files to `directory`, checked and on the disk. Blocks.

    The files are copied, so that later changes of the source do not affect serving. `describe` makes the folder's
    record from the rank and the digest. `max_vocabulary`: see `check_size`. Raises `AdapterInvalid`, and `OSError` when
    the disk is full or `directory` exists.
    """
    written = None
    if not isinstance(source, Path):
        written = directory.with_name(f"{directory.name}{PARTIAL}written")
        source(written)
    try:
        with fresh_directory(directory) as partial:
            folder = written or _folder(source)
            files = read_files(folder, base, max_rank=max_rank, max_vocabulary=max_vocabulary)
            for name, data in files.items():
                write_file(partial / name, data)
            adapter = read_adapter(partial, base, max_rank=max_rank)
            check_size(adapter, base, max_vocabulary)
            write_card(partial, _own_card(folder, adapter, base))
            write_file(partial / RECORD, describe(adapter.rank, digest_of(files)))
    finally:
        if written is not None:
            remove(written)


def check_size(adapter: Adapter, base: LoraBase, most: int | None) -> None:
    """Raise `AdapterInvalid` where rows of embedding and head take more than `most` bytes as they are served."""
    if most is None or adapter.vocabulary is None or base.vocabulary is None:
        return
    size = adapter.vocabulary.values * base.vocabulary.bytes_per_value
    if size > most:
        raise AdapterInvalid(
            f"The adapter's rows of embedding and head take {size} bytes; the setting adapters.max_vocabulary_bytes "
            f"allows {most}."
        )


def _own_card(folder: Path, adapter: Adapter, base: LoraBase) -> Card:
    """The card in a folder, with the number of ids that the weights have; without tokens in it, those of the folder's
    tokenizer.json where the adapter has rows of its own."""
    card, known = read_card(folder), 0 if base.vocabulary is None else base.vocabulary.size
    size = known if adapter.vocabulary is None else max(known, adapter.vocabulary.size)
    tokens = card.tokens
    if adapter.vocabulary is not None and not tokens:
        tokens = tuple(token for token in read_tokens(folder) if token.id < size)
    return msgspec.structs.replace(card, tokens=tokens, vocab_size=size if size > known else None)


def _folder(source: VersionSource) -> Path:
    if not isinstance(source, Path) or not source.is_dir():
        raise AdapterInvalid("The adapter must be a folder, as PEFT's save_pretrained writes it.")
    return source


def digest(directory: Path) -> str:
    """SHA-256 over the files' names and contents, in hexadecimal. Raises `OSError`."""
    return digest_of({name: (directory / name).read_bytes() for name in FILES})


def digest_of(files: Mapping[str, bytes]) -> str:
    """As `digest`, for contents of files by name."""
    total = hashlib.sha256()
    for name in FILES:
        data = files[name]
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def versions(root: Path) -> list[Path]:
    """The folders of all versions, finished or not: `name/number` below the root. Everything else there is ignored."""
    return [
        path
        for path in sorted(root.glob("*/*"))
        if path.name.partition(PARTIAL)[0].isdigit() and path.is_dir() and not path.is_symlink()
    ]


def sweep(state: Path, root: Path, live: Collection[Path], deleted: Collection[Path]) -> None:
    """Move versions without a row to lost+found. Delete versions whose rows mark them as deleted, and unfinished ones,
    which their names show."""
    lost = LostFound(state)
    for directory in versions(root):
        if directory in live:
            continue
        if directory in deleted or PARTIAL in directory.name:
            remove(directory)
            _log.info("adapter_leftover_deleted", folder=f"{directory.parent.name}/{directory.name}")
        else:
            lost.keep(directory)


# -- records ---------------------------------------------------------------------------------------
#
# Copies of rows beside the files, for the case that the database is lost (`recovery`).

NAMES = ".names.json"
"""File in the folder of all adapters; no adapter's name begins with a dot."""


class NamesMirror:
    """The file with the meaning of names, rewritten after each change. Event loop only."""

    def __init__(self, root: Path) -> None:
        self._path = root / NAMES
        self._wanted = b""
        self._written = b""
        self._lock = asyncio.Lock()

    async def write(self, names: list[NameRecord]) -> None:
        """Write the names, or newer ones, to the disk. A failure is logged."""
        self._wanted = msgspec.json.format(msgspec.json.encode(names))
        async with self._lock:
            data = self._wanted
            if data == self._written or not (names or self._written):
                return
            try:
                await asyncio.to_thread(self._replace, data)
            except OSError as error:
                _log.warning("cannot_write_adapter_names", reason=reason(error))
            else:
                self._written = data

    def _replace(self, data: bytes) -> None:
        make_directory(self._path.parent)
        replace_file(self._path, data)


def write_missing_record(directory: Path, version: Version) -> None:
    """Write the record that a version's folder of an older Eft lacks. Raises `OSError`."""
    if directory.is_dir() and not (directory / RECORD).exists():
        write_file(directory / RECORD, msgspec.json.format(msgspec.json.encode(version)))


# -- memory ----------------------------------------------------------------------------------------
#
# The versions that requests may name at the engine, which loads each as it is needed.

MAX_NAMED = 4096
"""Versions that the engine knows at once: files that were checked, and tokenizers."""


class AdapterHost(Protocol):
    """Interface of the engine's service, which applies adapters."""

    model_name: str
    lora_base: LoraBase
    metrics: Metrics

    async def add_adapter(self, key: str, files: Callable[[], str]) -> None: ...

    async def warm_adapter(self, key: str) -> None: ...

    async def unload_adapter(self, key: str) -> None: ...

    def adapter_loaded(self, key: str) -> bool: ...

    def adapter_in_use(self, key: str) -> bool: ...


class VersionFiles:
    """The files of a version, checked before they are read. Any thread."""

    def __init__(self, version: Version, directory: Path) -> None:
        self._version = version
        self._directory = directory
        self._checked: list[tuple[int, int, int]] = []
        """Inode, size and time of the last change of each file when their digest was right."""

    def __call__(self) -> str:
        """The folder. Raises `AdapterInvalid`, `OSError`."""
        found = [(one.st_ino, one.st_size, one.st_mtime_ns) for one in (os.stat(self._directory / n) for n in FILES)]
        if found != self._checked:
            if digest(self._directory) != self._version.sha256:
                raise AdapterInvalid("its files were changed")
            self._checked = found
        return str(self._directory)


class NamedVersions:
    """The versions that requests may name at the host. Event loop only. After `ensure`, and until the caller next
    awaits, the version may be named: a request that is submitted at once is taken."""

    def __init__(self, host: AdapterHost) -> None:
        self._host = host
        self._named: OrderedDict[str, None] = OrderedDict()
        """Keys of versions, least recently used first."""
        self._one_at_a_time = asyncio.Lock()

    async def ensure(self, version: Version, directory: Path) -> None:
        """Let requests name a version, whose files are checked the first time. Raises `AdapterUnavailable`,
        `StorageUnavailable`."""
        if version.key not in self._named:
            async with self._one_at_a_time:
                if version.key not in self._named:
                    await self._forget_unused()
                    files = VersionFiles(version, directory)
                    await self._checked(version, self._host.add_adapter(version.key, files))
                    self._named[version.key] = None
        self._named.move_to_end(version.key)

    async def warm(self, version: Version, directory: Path) -> None:
        """Let requests name a version, check that it can be read, and load it if there is room. Raises as `ensure`."""
        await self.ensure(version, directory)
        try:
            await self._checked(version, self._host.warm_adapter(version.key))
        except AdapterUnavailable:
            await self.release(version.key)
            raise

    async def release(self, key: str) -> None:
        """Release a version; the engine keeps it as long as requests run on it."""
        async with self._one_at_a_time:
            if key in self._named:
                del self._named[key]
                await self._host.unload_adapter(key)

    async def _checked(self, version: Version, work: Awaitable[None]) -> None:
        try:
            await work
        except (OSError, AdapterInvalid) as error:
            if isinstance(error, OSError) and error.errno in TOO_MANY_FILES:  # not a fault of the files
                raise storage_unavailable(f"{version.id} cannot be loaded now", error) from error
            _log.error("adapter_unavailable", adapter=version.id, reason=str(error))
            raise AdapterUnavailable(f"{version.id} cannot be loaded: its files are missing or damaged.") from error

    async def _forget_unused(self) -> None:
        if len(self._named) >= MAX_NAMED:
            unused = next((key for key in self._named if not self._host.adapter_in_use(key)), None)
            if unused is not None:
                del self._named[unused]
                await self._host.unload_adapter(unused)
