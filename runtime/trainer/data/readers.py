"""Rows out of JSONL, JSON, CSV and Parquet, and of data sets of a hub, one at a time: a file is never held as rows.

A row is numbered from 1 by its place in the file: lines of a JSONL file, blank ones included, and records of the
others. Rows are objects; the formats interpret their fields.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import msgspec

from runtime.errors import InvalidRequest
from runtime.trainer.data.example import RowProblem
from runtime.trainer.data.files import DataFile

# -- json array ------------------------------------------------------------------------------------
#
# The items of a JSON array, one at a time: the file is never held as a whole.
#
# Only the bounds of items are found here, by brackets, commas and strings; the reader of an item decodes it.

CHUNK = 1024 * 1024
"""Bytes read at once."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)
"""A whole string, a mark outside of strings, or the start of a string whose end was not read yet."""


class NotAnArray(ValueError):
    """The file is no JSON array, or an item is too long."""


def array_items(stream: BinaryIO, *, longest: int) -> Iterator[bytes]:
    """The bytes of each item of the array that `stream` holds, at most `longest` each. Raises `NotAnArray`."""
    buffer = stream.read(CHUNK)
    start = at = buffer.find(b"[") + 1
    assert start, "the caller has looked"
    number, depth = 1, 1
    while True:
        token = _TOKEN.search(buffer, at)
        if token is None or token[0] == b'"':
            at = (len(buffer) if token is None else token.start()) - start
            if len(buffer) - start > longest:
                raise NotAnArray(f"row {number} is longer than {longest} bytes")
            chunk = stream.read(CHUNK)
            if not chunk:
                raise NotAnArray(f"this is not a JSON array: it ends within row {number}")
            buffer, start = buffer[start:] + chunk, 0
            continue
        mark, at = token[0], token.end()
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth == 0 or (mark == b"," and depth == 1):
            item = buffer[start : at - 1].strip(b" \t\r\n")
            if item:
                yield item
            elif depth or number > 1:
                raise NotAnArray(f"this is not a JSON array: row {number} is empty")
            number, start = number + 1, at
        if depth == 0:
            break
    if buffer[at:].strip(b" \t\r\n") or any(chunk.strip(b" \t\r\n") for chunk in iter(lambda: stream.read(CHUNK), b"")):
        raise NotAnArray("this is not a JSON array: something follows its end")


# -- broken text -----------------------------------------------------------------------------------
#
# Places in a row of text that is not Unicode: bytes that are not UTF-8, and halves of surrogate pairs.

_SURROGATES = range(0xD800, 0xE000)
MAX_LOOK = 1024 * 1024
"""Bytes of a row that are searched for the column at fault."""


def broken_bytes(data: bytes, error: UnicodeDecodeError) -> RowProblem:
    """Problem of a JSON object that is not UTF-8: the byte, and the column that it is in."""
    if is_surrogate(data[error.start :]):
        text = data.decode("utf-8", "surrogatepass") if _decodes(data) else ""
        if text and (problem := lone_surrogate(text)) is not None:
            return problem
    column = _column_of(data[: error.start]) if len(data) <= MAX_LOOK else None
    where = f", in column {column!r}" if column else ""
    return RowProblem(f"is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}{where}")


def lone_surrogate(text: str) -> RowProblem | None:
    """Problem of the text of a JSON object that Python reads and that holds half a surrogate pair; None where there is
    none."""
    if len(text) > MAX_LOOK:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return problem_of(value)


def problem_of(row: Any) -> RowProblem | None:
    """The first half of a surrogate pair in a row that was read, with its column and place."""
    if not isinstance(row, dict):
        return None
    for column, value in row.items():
        for path, text in [("", str(column)), *_texts(value, "")]:
            at = next((index for index, char in enumerate(text) if ord(char) in _SURROGATES), None)
            if at is not None:
                where = f"column {_shown(str(column))!r}{f', {_shown(path)}' if path else ''}"
                return RowProblem(f"{where} holds a lone surrogate (U+{ord(text[at]):04X}) at character {at}")
    return None


def _shown(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:80]


def is_surrogate(data: bytes) -> bool:
    """True if a surrogate begins here, encoded as UTF-8 would if it could."""
    return len(data) > 1 and data[0] == 0xED and 0xA0 <= data[1] <= 0xBF


def _decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _texts(value: Any, path: str) -> list[tuple[str, str]]:
    """Every text in a value, with where it is: `[1].content`. Without recursion: JSON may be deep."""
    found, stack = list[tuple[str, str]](), [(path, value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            found.append((path, value))
        elif isinstance(value, dict):
            for key, item in reversed(value.items()):
                stack.append((f"{path}.{key}" if path else str(key), item))
                stack.append((f"a key of {path}" if path else "a key", str(key)))
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", item) for index, item in reversed(list(enumerate(value)))]
    return found


def _column_of(before: bytes) -> str | None:
    """The top-level key of a JSON object whose value the end of `before` is in."""
    text = before.decode("utf-8", "replace")
    depth, key, last, at = 0, None, None, 0
    while at < len(text):
        char = text[at]
        if char == '"':
            end = at + 1
            while end < len(text) and text[end] != '"':
                end += 2 if text[end] == "\\" else 1
            last, at = text[at + 1 : end], end
        elif char == ":" and depth == 1:
            key = last
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        at += 1
    return key[:40] if key else None


MAX_LINE = 16 * 1024**2
"""Bytes of a line: far more than any context holds."""
MAX_JSON = 512 * 1024**2
"""Bytes of a file that is one JSON array."""
MAX_ROW_GROUP = 2 * 1024**3
"""Bytes of a Parquet file's row group, uncompressed, as the file has it."""
_PARQUET_BATCH = 16
"""Rows decoded at once."""
_PARQUET_BUFFER = 1024**2
"""Bytes of a column that are read at once."""

DataRow = dict[str, Any]
Numbered = tuple[int, DataRow | RowProblem]
"""A row and its number, or why it cannot be read."""

_FORMATS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".ndjson": "jsonl"}

csv.field_size_limit(MAX_LINE)


def read_rows(file: DataFile, format: str | None = None, *, param: str = "datasets") -> Iterator[Numbered]:
    """The rows of a file; `format` is that of its ending by default.

    Raises `InvalidRequest` for a file that is not of its format, and what `DataFile.open` raises.
    """
    kind = format or _FORMATS.get(file.path.suffix.lower()) or _FORMATS.get(_suffix(file.name))
    if kind is None:
        raise InvalidRequest(
            f"{file.name} does not end in one of {', '.join(_FORMATS)}: give its format as ds_type.", param=param
        )
    with file.open() as stream:
        try:
            yield from _READERS[kind](stream)
        except _Broken as error:
            raise InvalidRequest(f"{file.name}: {error}", param=param, code="invalid_data") from None


class _Broken(Exception):
    """The file as a whole cannot be read any further."""


def _jsonl(stream: BinaryIO) -> Iterator[Numbered]:
    for number, line in _lines(stream):
        if line.strip():
            yield number, _object(line)


def _json(stream: BinaryIO) -> Iterator[Numbered]:
    """An array of objects; or lines of objects, as files that are called .json often hold."""
    start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    stream.seek(0)
    if start != b"[":
        yield from _jsonl(stream)
        return
    if stream.seek(0, os.SEEK_END) > MAX_JSON:
        raise _Broken(f"a JSON array may have at most {MAX_JSON} bytes; use JSONL for more")
    stream.seek(0)
    try:
        for number, item in enumerate(array_items(stream, longest=MAX_LINE), 1):
            yield number, _object(item)
    except NotAnArray as error:
        raise _Broken(str(error)) from None


def _csv(stream: BinaryIO) -> Iterator[Numbered]:
    # Bytes that are not UTF-8 pass as halves of surrogate pairs, so that their row and column can be named.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(stream))
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header)
        if len(set(header)) != len(header):
            raise _Broken(f"the header names a column twice: {', '.join(header)[:200]}")
        for number, record in enumerate(reader, 1):
            if len(record) == len(header):
                yield number, _cells(header, record)
            elif record:
                yield number, RowProblem(f"has {len(record)} fields, and the header has {len(header)}")
    except (csv.Error, RowProblem) as error:
        raise _Broken(f"line {reader.line_num}: {error}") from None


def _parquet(stream: BinaryIO) -> Iterator[Numbered]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream, buffer_size=_PARQUET_BUFFER)
        for index in range(table.num_row_groups):
            size = table.metadata.row_group(index).total_byte_size
            if size > MAX_ROW_GROUP:
                raise _Broken(f"row group {index} has {size} bytes, more than {MAX_ROW_GROUP}")
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, use_threads=False):
            # The size that the file gives is that of its encoding: a dictionary's value may stand for many.
            if batch.nbytes > _PARQUET_BATCH * MAX_LINE:
                raise _Broken(f"rows {number + 1} to {number + batch.num_rows} have {batch.nbytes} bytes")
            for row in _parquet_rows(batch):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise _Broken(f"this is not a Parquet file that can be read: {error}") from None


def _parquet_rows(batch: Any) -> list[DataRow | RowProblem]:
    """The rows of a batch; where a text is not UTF-8, one after the other, to find which it is."""
    try:
        rows: list[DataRow | RowProblem] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        return [_parquet_row(batch, index) for index in range(batch.num_rows)]


def _parquet_row(batch: Any, index: int) -> DataRow | RowProblem:
    row: DataRow = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return RowProblem(
                f"column {name!r} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
            )
    return row


def _check_header(header: list[str]) -> None:
    try:
        ",".join(header).encode()
    except UnicodeEncodeError:
        raise _Broken("the header is not UTF-8 text") from None


def _cells(header: list[str], record: list[str]) -> DataRow | RowProblem:
    for name, cell in zip(header, record, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            code = ord(cell[error.start])
            what = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
            return RowProblem(f"column {name!r} is not UTF-8 text: character {error.start} is {what}")
    return dict(zip(header, record, strict=True))


_READERS: dict[str, Callable[[BinaryIO], Iterator[Numbered]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise _Broken(f"row {number} is longer than {MAX_LINE} bytes")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _object(data: bytes) -> DataRow | RowProblem:
    try:
        value = msgspec.json.decode(_text(data))
    except RowProblem as problem:
        return problem
    except RecursionError:
        return RowProblem("is nested too deeply")
    except msgspec.MsgspecError as error:
        return _surrogate(data) or RowProblem(f"is not JSON: {error}")
    return value if isinstance(value, dict) else RowProblem("is not an object of fields")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise broken_bytes(data, error) from None


def _surrogate(data: bytes) -> RowProblem | None:
    """Half of a surrogate pair, written as an escape: msgspec says of it that the JSON is malformed."""
    return lone_surrogate(data.decode("utf-8-sig", "replace")) if b"\\ud" in data.lower() else None


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


# -- data sets of a hub ----------------------------------------------------------------------------
#
# By id: fetched by the library `datasets` (extra `hub`) into its own cache, or read from there without a network. Code
# that comes with a data set is never run. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have that library's meaning.

MAX_REASON = 300
"""Characters of the library's message that an error repeats."""


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set."""

    name: str
    """Its id, as the recipe has it."""
    config: str | None
    revision: str | None
    split: str
    data_files: tuple[str, ...]
    streams: bool
    """Fetched row by row, as far as it is read, instead of whole."""
    param: str
    """Key of the recipe, for errors."""

    def __iter__(self) -> Iterator[Numbered]:
        """The rows with their numbers, from 1. Raises `InvalidRequest`."""
        rows = iter(self._loaded)
        number = 0
        while True:
            try:
                row: DataRow = dict(next(rows))
            except StopIteration:
                return
            except Exception as error:  # of the network, or of a file that is not what it says
                raise self._problem(f"cannot be read after row {number}: {_reason(error)}") from error
            number += 1
            yield number, row

    @cached_property
    def _loaded(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise self._problem(
                "is a data set of a hub, and the library `datasets` is not installed: pip install 'eft-server[hub]'"
            ) from None
        chosen: dict[str, Any] = {"data_files": list(self.data_files)} if self.data_files else {}
        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streams, **chosen
            )
        except Exception as error:  # it has no base class for its errors, and those of the network are others'
            raise self._problem(f"cannot be fetched: {_reason(error)}") from error

    def _problem(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.name} {what}.", param=self.param, code="data_not_found")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:MAX_REASON].rstrip(".")
