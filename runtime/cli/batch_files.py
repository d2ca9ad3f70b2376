"""The two files of `eft batch`: requests in, one JSON object a line, and results out, appended.

The output is also the record of what is done. A line counts once it is complete; a torn last line,
left by a crash, is cut off before more is appended.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec
from msgspec import Struct

from runtime.cli.errors import UsageError

PATHS = ("/v1/chat/completions", "/v1/completions")


class Job(Struct, frozen=True):
    """One request of the input."""

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]

    @property
    def key(self) -> str | int:
        return self.custom_id


class BadLine(Struct, frozen=True):
    """A line of the input that is no request. `custom_id` where it has one."""

    line: int
    custom_id: str | None
    reason: str

    @property
    def key(self) -> str | int:
        """What the output knows it by."""
        return self.line if self.custom_id is None else self.custom_id


def read_input(path: Path) -> Iterator[Job | BadLine]:
    """The input's lines in order, blank ones left out. Raises `UsageError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse(number, raw)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def input_keys(path: Path) -> set[str | int]:
    """The keys of all lines. Raises `UsageError` for a custom_id that occurs twice, and for no file."""
    first: dict[str | int, int] = {}
    for item in read_input(path):
        if item.key in first:
            raise UsageError(
                f"{path}: custom_id {item.key!r} of line {item.line} is also that of line {first[item.key]}"
            )
        first[item.key] = item.line
    return set(first)


def _parse(number: int, raw: bytes) -> Job | BadLine:
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadLine(number, None, f"is no JSON: {error}")
    if not isinstance(line, dict):
        return BadLine(number, None, "is no JSON object")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, f"custom_id must be a non-empty string, got {custom_id!r:.80}")
    if reason := _fault(line):
        return BadLine(number, custom_id, reason)
    return Job(number, custom_id, line["url"], line["body"])


def _fault(line: dict[str, Any]) -> str | None:
    if unknown := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        return f"has unknown keys: {', '.join(unknown)}"
    if line.get("method", "POST") != "POST":
        return f"method must be POST, got {line['method']!r:.80}"
    if line.get("url") not in PATHS:
        return f"url must be {' or '.join(PATHS)}, got {line.get('url')!r:.80}"
    if not isinstance(line.get("body"), dict):
        return "body must be an object"
    return "stream is not possible in a batch" if line["body"].get("stream") else None


class Output:
    """The output file, open for appending and locked against a second run. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` where it cannot be written, is in use, or holds something else."""
        self._path = path
        self.done: set[str | int] = set()
        """custom_ids of complete lines; the line number for an input line that had none."""
        self.failed = 0
        """How many of them hold an error, or an answer other than 200."""
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            self._lock()
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another eft batch is writing {self._path}") from error
        except OSError as error:
            raise UsageError(f"cannot lock {self._path}: {error.strerror}") from error

    def _resume(self) -> None:
        self._file.seek(0)
        complete = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            self.done.add(self._key(number, raw))
            complete += len(raw)
        self._file.truncate(complete)

    def _key(self, number: int, raw: bytes) -> str | int:
        """What a complete line says is done."""
        try:
            line = msgspec.json.decode(raw)
            custom_id, error = line["custom_id"], line["error"]
            self.failed += error is not None or line["response"]["status_code"] != 200
            return str(custom_id) if custom_id is not None else int(error["line"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self._path} exists, and its line {number} is no result of a batch: choose another output"
            ) from error
