"""The examples of a job as a file in its folder, so that its data is read and tokenised once.

Layout: magic, then the length of the header (4 bytes, little-endian), the header (MessagePack), the examples one
after the other (ids as uint32, then a byte a token: 1 where it is trained on), and BLAKE2b over all of that. The
header has a key of everything that the examples were made from besides the rows.
"""

import hashlib
import os
import sys
import uuid
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from runtime.adapters.card import Prompt
from runtime.errors import InvalidRequest
from runtime.support.durable import PARTIAL, create_file, reason, remove, sync_directory
from runtime.support.logs import get_logger
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import MAX_TOKENS, RowCounts
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.schema import keys_of

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
    """The prepared data of one job, in its folder."""

    def __init__(self, path: Path, digest: Callable[[], str]) -> None:
        """`digest` gives the `digest_of_tokenizer`."""
        self._path = path
        self._digest = digest

    def read(self, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> PreparedData | None:
        """The data, or None, with the reason in the log, where it has to be read from the rows."""
        try:
            key = data_key(recipe, self._digest(), tokenizer, ends)
            return read_prepared(self._path, key, vocab_size=tokenizer.vocab_size)
        except PreparedAbsent:
            _log.info("data_is_tokenised", job=self._path.parent.name)
        except PreparedInvalid as error:
            _log.warning("data_is_tokenised_again", job=self._path.parent.name, reason=str(error))
        return None

    def write(self, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int], data: PreparedData) -> None:
        """Keep the data, as far as the disk lets it: without the file it is read from the rows again."""
        try:
            write_prepared(self._path, data_key(recipe, self._digest(), tokenizer, ends), data)
        except OSError as error:
            _log.warning("prepared_data_not_kept", job=self._path.parent.name, reason=reason(error))


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


def data_key(recipe: Recipe, tokenizer_digest: str, tokenizer: Tokenizer, ends: Collection[int]) -> str:
    """Key of what examples are made from besides the rows: the recipe's data keys, the served model's tokenizer, the
    template of `tokenizer`, which may be the recipe's, and the ids that end a turn."""
    keys = {name: getattr(recipe, name) for name in keys_of("data")}
    if recipe.rl is not None:  # the methods of pairs read the same
        keys["rl"] = recipe.answers_per_row
    return _digest_of([sys.byteorder, tokenizer_digest, tokenizer.chat_template, sorted(ends), keys])


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
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        with create_file(partial) as file:
            total = hashlib.blake2b(digest_size=_DIGEST)
            for piece in _pieces(msgspec.msgpack.encode(header), data):
                total.update(piece)
                file.write(piece)
            file.write(total.digest())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        remove(partial)
        raise
    sync_directory(path.parent)


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
