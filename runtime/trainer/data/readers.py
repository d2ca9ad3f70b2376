"""Rows out of JSONL, JSON, CSV and Parquet, one at a time: a file is never held as rows.

A row is numbered from 1 by its place in the file: lines of a JSONL file, blank ones included, and records of the
others. Rows are objects; what their fields mean is the formats' business.
"""

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import msgspec

from runtime.errors import InvalidRequest
from runtime.trainer.data.files import DataFile
from runtime.trainer.data.problems import RowProblem

MAX_LINE = 16 * 1024**2
"""Bytes of a line: far more than any context holds."""
MAX_JSON = 512 * 1024**2
"""Bytes of a file that is one JSON array, which is read whole."""
MAX_ROW_GROUP = 2 * 1024**3
"""Bytes of a Parquet file's row group, uncompressed."""
_PARQUET_BATCH = 256

Row = dict[str, Any]
Numbered = tuple[int, Row | RowProblem]
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
    """The file as a whole cannot be read on."""


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
    data = stream.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise _Broken(f"a JSON array may have at most {MAX_JSON} bytes; use JSONL for more")
    try:
        items = msgspec.json.decode(_text(data), type=list[msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, RowProblem) as error:
        raise _Broken(f"this is not a JSON array: {error}") from None
    for number, item in enumerate(items, 1):
        yield number, _object(bytes(item))


def _csv(stream: BinaryIO) -> Iterator[Numbered]:
    lines = (_text(line) for _, line in _lines(stream))
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise _Broken(f"the header names a column twice: {', '.join(header)[:200]}")
        for number, record in enumerate(reader, 1):
            if len(record) == len(header):
                yield number, dict(zip(header, record, strict=True))
            elif record:
                yield number, RowProblem(f"has {len(record)} fields, and the header has {len(header)}")
    except (csv.Error, RowProblem) as error:
        raise _Broken(f"line {reader.line_num}: {error}") from None


def _parquet(stream: BinaryIO) -> Iterator[Numbered]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        for index in range(table.num_row_groups):
            size = table.metadata.row_group(index).total_byte_size
            if size > MAX_ROW_GROUP:
                raise _Broken(f"row group {index} has {size} bytes, more than {MAX_ROW_GROUP}")
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _Broken(f"this is not a Parquet file that can be read: {error}") from None


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


def _object(data: bytes) -> Row | RowProblem:
    try:
        value = msgspec.json.decode(_text(data))
    except RowProblem as problem:
        return problem
    except RecursionError:
        return RowProblem("is nested too deeply")
    except msgspec.MsgspecError as error:
        return RowProblem(f"is not JSON: {error}")
    return value if isinstance(value, dict) else RowProblem("is not an object of fields")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()
