"""The examples of a job as a file in its folder, and of earlier jobs in a cache: data is read and tokenised once.

Layout: magic, then the length of the header (4 bytes, little-endian), the header (MessagePack), the examples one
after the other (ids as uint32, then a byte a token: 1 where it is trained on), and BLAKE2b over all of that. The
header has a key of everything that the examples were made from besides the rows.
"""

import functools
import hashlib
import os
import shutil
import sys
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
from msgspec import Struct

from runtime.adapters.card import Prompt
from runtime.errors import InvalidRequest, RequestError
from runtime.support.durable import PARTIAL, create_file, make_directory, reason, remove, replacing, write_with
from runtime.support.logs import get_logger
from runtime.support.version import version
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import MAX_TOKENS, RowCounts, names_of
from runtime.trainer.data.files import DataFiles
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.schema import DATA_GROUPS, keys_of

_log = get_logger("jobs")

MAGIC = b"eft-examples-3\n"
MAX_HEADER = 256 * 1024**2
"""Bytes of a header, most of which are the lengths of the examples."""
_DIGEST = 32
"""Bytes of the digest at the end."""
_PROBE = "The Newt's 3 eggs: naïve café, 12,345.67 — Ελληνικά, русский, 中文, 🦎\n\tdef f(x):  return x+1\r\n"
"""Text whose ids, and whose prompt in a chat, tell tokenizers of the same vocabulary apart."""


class PreparedData(Struct, frozen=True, kw_only=True):
    """The data of a recipe, read, formatted and tokenised, before any row is held out."""

    train: list[Example]
    test: list[Example]
    generation: list[Example]
    """Rows of `generation_datasets`."""
    train_counts: RowCounts
    test_counts: RowCounts
    prompt: Prompt
    """Form of requests to the adapter."""
    warnings: list[str]
    """Likely mistakes in the rows."""
    notes: list[str]
    """Columns, fields and files that nothing reads."""


class PreparedInvalid(Exception):
    """The file cannot be used. The message gives the reason."""


class PreparedAbsent(PreparedInvalid):
    """There is no file."""


class KeptData:
    """The prepared data of one recipe: in the folder of its job, and in the cache of all."""

    def __init__(self, path: Path | None, digest: Callable[[], str], cache: "PreparedCache | None" = None) -> None:
        """`path`: file of the job; None for a recipe that is not to become one. `digest` gives the
        `digest_of_tokenizer`."""
        self._path = path
        self._digest = digest
        self._cache = cache
        self._job = "" if path is None else path.parent.name
        self._contents: DataContents | None = None
        """Contents of the recipe's files, before they are read."""

    def read(
        self, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int], files: DataFiles
    ) -> PreparedData | None:
        """The data, or None, with the reason in the log, where it has to be read from the rows. Blocks."""
        key = data_key(recipe, self._digest(), tokenizer, ends)
        if self._path is not None:
            try:
                return read_prepared(self._path, key, vocab_size=tokenizer.vocab_size)
            except PreparedAbsent:
                pass
            except PreparedInvalid as error:
                _log.warning("data_is_tokenised_again", job=self._job, reason=str(error))
        if self._cache is not None:
            self._contents = contents_of(recipe, files)
        if self._cache is not None and self._contents is not None:
            data = self._cache.take(self._contents.name(key), key, tokenizer.vocab_size)
            if data is not None:
                _log.info("data_was_tokenised_before", job=self._job)
                self._keep(self._contents.name(key), key, data)
                return data
        _log.info("data_is_tokenised", job=self._job)
        return None

    def write(self, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int], data: PreparedData) -> None:
        """Keep the data, as far as the disk lets it: without the file it is read from the rows again. Data whose files
        changed while they were read is not for other jobs."""
        key, contents = data_key(recipe, self._digest(), tokenizer, ends), self._contents
        try:
            if self._path is not None:
                write_prepared(self._path, key, data)
            if self._cache is not None and contents is not None and contents.unchanged():
                self._cache.add(contents.name(key), key, data, source=self._path)
        except OSError as error:
            _log.warning("prepared_data_not_kept", job=self._job, reason=reason(error))

    def _keep(self, name: str, key: str, data: PreparedData) -> None:
        """Give the job its own name for an entry of the cache, or a copy."""
        if self._path is None or self._cache is None:
            return
        try:
            try:
                link_or_copy(self._cache.entry(name), self._path)
            except FileNotFoundError:  # deleted meanwhile, for others that were used later
                write_prepared(self._path, key, data)
        except OSError as error:
            _log.warning("prepared_data_not_kept", job=self._job, reason=reason(error))


class _Header(Struct, frozen=True, kw_only=True):
    key: str
    lengths: tuple[bytes, bytes, bytes]
    """Of the examples to train on, to test on, and to generate answers for; uint32 each."""
    weights: tuple[bytes, bytes, bytes]
    """float32 each."""
    train_counts: RowCounts
    test_counts: RowCounts
    prompt: Prompt
    warnings: list[str]
    notes: list[str]


UNREAD = frozenset(
    {"val_set_size", "shuffle_merged_datasets", "sample_packing", "sample_packing_sequentially", "group_by_length"}
)
"""Data keys that say what becomes of examples, and not what they are made of."""


def data_key(recipe: Recipe, tokenizer_digest: str, tokenizer: Tokenizer, ends: Collection[int]) -> str:
    """Key of what examples are made from besides the rows: the recipe's data keys, the served model's tokenizer, the
    template of `tokenizer`, which may be the recipe's, and the ids that end a turn."""
    keys = {name: getattr(recipe, name) for name in keys_of("data") if name not in UNREAD}
    if recipe.rl is not None:  # the methods of pairs read the same
        keys["rl"] = recipe.answers_per_row
    if recipe.shuffle_before_merging_datasets or any(entry.shards for entry in _entries(recipe)):
        keys["seed"] = recipe.seed
    if recipe.streaming:  # read as far as the steps take
        keys["streamed"] = [recipe.max_steps, recipe.effective_batch, recipe.sample_packing]
    return _digest_of([sys.byteorder, tokenizer_digest, tokenizer.chat_template, sorted(ends), keys])


def _entries(recipe: Recipe) -> Iterator[Any]:
    return (entry for group in DATA_GROUPS for entry in getattr(recipe, group))


def digest_of_tokenizer(tokenizer: Tokenizer) -> str:
    """Digest of a tokenizer's vocabulary, template, and behaviour on a probe. Takes some 50 ms; Python's lock is never
    held for long."""
    tokens = hashlib.blake2b(digest_size=16)
    for id in range(tokenizer.num_ids):
        tokens.update(tokenizer.token_string(id).encode() + b"\0")
    chat = ""
    if tokenizer.chat_template is not None:
        try:
            chat = tokenizer.render_chat([{"role": "user", "content": _PROBE}])
        except InvalidRequest as error:  # a template of other roles
            chat = error.message
    return _digest_of(
        [
            tokens.digest(),
            tokenizer.chat_template,
            chat,
            tokenizer.encode(_PROBE),
            tokenizer.bos_id,
            tokenizer.wants_bos,
            tokenizer.eos_ids,
            tokenizer.vocab_size,
        ]
    )


def _digest_of(values: list[Any]) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(values, order="deterministic"), digest_size=16).hexdigest()


# -- writing ---------------------------------------------------------------------------------------


def write_prepared(path: Path, key: str, data: PreparedData) -> None:
    """Write the file, whole or not at all, in place of an existing one. Blocks. Raises `OSError`."""
    header = _Header(
        key=key,
        lengths=_each(data, lambda some: array("I", map(len, some)).tobytes()),
        weights=_each(data, lambda some: array("f", [example.weight for example in some]).tobytes()),
        train_counts=data.train_counts,
        test_counts=data.test_counts,
        prompt=data.prompt,
        warnings=data.warnings,
        notes=data.notes,
    )
    with replacing(path) as partial, create_file(partial) as file:
        total = hashlib.blake2b(digest_size=_DIGEST)
        for piece in _pieces(msgspec.msgpack.encode(header), data):
            total.update(piece)
            file.write(piece)
        file.write(total.digest())
        file.flush()
        os.fsync(file.fileno())


def _each(data: PreparedData, encoded: Callable[[list[Example]], bytes]) -> tuple[bytes, bytes, bytes]:
    return encoded(data.train), encoded(data.test), encoded(data.generation)


def _pieces(header: bytes, data: PreparedData) -> Iterator[bytes]:
    yield MAGIC + len(header).to_bytes(4, "little") + header
    for example in (*data.train, *data.test, *data.generation):
        yield array("I", example.token_ids).tobytes() + bytes(example.trained)


# -- reading ---------------------------------------------------------------------------------------


def read_prepared(path: Path, key: str, *, vocab_size: int) -> PreparedData:
    """Read the file. Blocks. Raises `PreparedInvalid` where it is absent, damaged, or was made with another key."""
    try:
        with path.open("rb") as file:
            return _read(_Checked(file, path.stat().st_size), key, vocab_size)
    except FileNotFoundError:
        raise PreparedAbsent("it is absent") from None
    except (OSError, msgspec.MsgspecError, ValueError, IndexError) as error:
        raise PreparedInvalid(f"it is damaged: {error}") from error


class _Checked:
    """A file whose bytes are added to a digest as they are read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._total = hashlib.blake2b(digest_size=_DIGEST)
        self.left = size - _DIGEST
        """Bytes before the digest that were not read yet."""

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("it is cut off")
        data = self._file.read(count)
        self.left -= count
        self._total.update(data)
        return data

    def check(self) -> None:
        """Raise `ValueError` unless all was read, and is as it was written."""
        if self.left or self._file.read() != self._total.digest():
            raise ValueError("its checksum is wrong")


def _read(file: _Checked, key: str, vocab_size: int) -> PreparedData:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is of another format")
    size = int.from_bytes(file.read(4), "little")
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size} bytes")
    header = msgspec.msgpack.decode(file.read(size), type=_Header)
    if header.key != key:
        raise PreparedInvalid("it was made with another tokenizer, template or recipe")
    lengths = [array("I", some) for some in header.lengths]
    if (tokens := sum(map(sum, lengths))) > MAX_TOKENS:
        raise ValueError(f"it has {tokens} tokens")
    shared = list(range(vocab_size))  # one object an id, as in `Reader`
    weights = [array("f", some) for some in header.weights]
    train, test, generation = (
        [_example(file, length, weight, shared) for length, weight in zip(*some, strict=True)]
        for some in zip(lengths, weights, strict=True)
    )
    file.check()
    return PreparedData(
        train=train,
        test=test,
        generation=generation,
        train_counts=header.train_counts,
        test_counts=header.test_counts,
        prompt=header.prompt,
        warnings=header.warnings,
        notes=header.notes,
    )


def _example(file: _Checked, length: int, weight: float, shared: list[int]) -> Example:
    ids = array("I", file.read(4 * length))
    return Example([shared[id] for id in ids], [flag == 1 for flag in file.read(length)], weight)


# -- cache -----------------------------------------------------------------------------------------
#
# Prepared data of all jobs below the state directory, in files named by what they were made from.

FOLDER = "prepared"
"""Folder of the cache, below the state directory."""
_ENDING = ".bin"


class DataContents(NamedTuple):
    """Contents of a recipe's files."""

    digest: str
    marks: tuple[tuple[Path, tuple[int, ...]], ...]
    """Each file with what changes when it is written to."""

    def name(self, key: str) -> str:
        """Name of an entry of the cache: a digest of all that examples are made from. `key`: the `data_key`."""
        return _digest_of([key, self.digest, version(), _code()])

    def unchanged(self) -> bool:
        """True if no file was written to, or replaced, since it was read for the digest."""
        with suppress(OSError):
            return all(_mark(path.stat()) == mark for path, mark in self.marks)
        return False


def contents_of(recipe: Recipe, files: DataFiles) -> DataContents | None:
    """The contents of a recipe's files, and the names of the files that it does not read. Reads all of them. None for
    data that is streamed or of a hub, and where a file cannot be read: the reader of the rows gives the reason."""
    if recipe.streaming:
        return None
    found, marks = list[Any](), list[tuple[Path, tuple[int, ...]]]()
    try:
        for entry in _entries(recipe):
            if files.is_hub(entry.path):
                return None
            for name in names_of(entry):
                for file in files.find_all(name):
                    with file.open() as stream:
                        marks.append((file.path, _mark(os.fstat(stream.fileno()))))
                        found.append([file.name, hashlib.file_digest(stream, "blake2b").digest()])
    except (OSError, RequestError):
        return None
    return DataContents(_digest_of([found, sorted(files.unused)]), tuple(marks))


def _mark(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@functools.cache
def _code() -> bytes:
    """Digest of the code that makes examples of rows: a tree that was changed reads them anew."""
    total, trainer = hashlib.blake2b(digest_size=16), Path(__file__).parents[1]
    folders: Sequence[Path] = (trainer / "data", trainer / "plan", trainer.parent / "text")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        total.update(path.read_bytes())
    return total.digest()


class PreparedCache:
    """Prepared data of earlier recipes. Those that were used last are kept. Any thread."""

    def __init__(self, folder: Path, max_bytes: int, max_age: float) -> None:
        """`max_bytes`: most bytes of all entries together; 0: there are none. `max_age`: seconds after its last use
        for which an entry is kept."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._lock = threading.Lock()

    def entry(self, name: str) -> Path:
        return self._folder / f"{name}{_ENDING}"

    def take(self, name: str, key: str, vocab_size: int) -> PreparedData | None:
        """The data of an entry, whole and as it was written; None without one. A damaged entry is deleted."""
        path = self.entry(name)
        try:
            data = read_prepared(path, key, vocab_size=vocab_size)
        except PreparedAbsent:
            return None
        except PreparedInvalid as error:
            _log.warning("prepared_data_not_used", path=str(path), reason=str(error))
            remove(path)
            return None
        with suppress(OSError):
            os.utime(path)  # the order of deletion
        return data

    def add(self, name: str, key: str, data: PreparedData, *, source: Path | None) -> None:
        """Keep an entry, and delete others for it; `source`: a file of the same, which gets a second name. Raises
        `OSError`."""
        if 5 * sum(map(len, (*data.train, *data.test, *data.generation))) > self._max_bytes or self._max_bytes == 0:
            return
        with self._lock:
            make_directory(self._folder)
            if source is None:
                write_prepared(self.entry(name), key, data)
            else:
                link_or_copy(source, self.entry(name))
            self._prune(dry_run=False)

    def prune(self, *, dry_run: bool = False) -> list[str]:
        """Delete the entries that are over their age, those that were used longest ago, as far as the others are within
        the bound, and what was never finished; returns their names. With `dry_run` they are only named."""
        with self._lock:
            return self._prune(dry_run=dry_run)

    def usage(self) -> tuple[int, int]:
        """Number of entries, and bytes of all."""
        found = self._files()
        return len(found), sum(status.st_size for _, status in found)

    def _prune(self, *, dry_run: bool) -> list[str]:
        found = sorted(self._files(), key=lambda item: item[1].st_mtime_ns, reverse=True)
        due, total, oldest = list[Path](), 0, time.time() - self._max_age
        for path, status in found:
            unfinished = PARTIAL in path.name
            total += 0 if unfinished else status.st_size
            if unfinished or total > self._max_bytes or status.st_mtime < oldest:
                due.append(path)
        for path in [] if dry_run else due:
            remove(path)
        return [path.name for path in due]

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and _ENDING in entry.name:
                        found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        return found


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, in place of an existing one; a copy where the disk has no links.
    Raises `OSError`."""
    with replacing(target) as partial:
        try:
            os.link(source, partial)
        except FileNotFoundError:
            raise
        except OSError:
            write_with(partial, functools.partial(shutil.copyfile, source))
