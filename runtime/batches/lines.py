"""The lines of a batch's input file: read in pieces, checked, found again by their numbers. Blocks; for threads."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from runtime.batches.records import MAX_CUSTOM_ID, LineError

PIECE_BYTES = 1024 * 1024
"""Bytes that are read at once."""


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of the input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class NumberedLine(msgspec.Struct, frozen=True):
    """A line of an input file that was checked."""

    number: int
    custom_id: str
    body: bytes


class _Chooser(msgspec.Struct):
    """The fields of a body that the check of its line looks at."""

    model: str | None = None
    stream: bool | None = None
    background: bool | None = None


_lines = msgspec.json.Decoder(Line)
_choosers = msgspec.json.Decoder(_Chooser)


class Checked(msgspec.Struct, kw_only=True):
    """The outcome of checking an input file."""

    total: int = 0
    """Requests."""
    model: str | None = None
    """Model of the first request."""
    errors: list[LineError] = msgspec.field(default_factory=list)


class TooLong(Exception):
    """A line is longer than the limit."""


def read_lines(path: Path, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. Raises `OSError`; `TooLong` at a line of over
    `max_bytes`, the number of which is its argument."""
    with open(path, "rb") as file:
        number, rest = 0, b""
        while piece := file.read(PIECE_BYTES):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                number += 1
                if len(line) > max_bytes:
                    raise TooLong(number)
                if stripped := line.strip():
                    yield number, stripped
            if len(rest) > max_bytes:
                raise TooLong(number + 1)
        if stripped := rest.strip():
            yield number + 1, stripped


def check_file(path: Path, *, endpoint: str, max_lines: int, max_bytes: int) -> Checked:
    """Check every line. `max_bytes`: of one line. Raises `OSError`."""
    checker = _Checker(endpoint)
    found = checker.found
    try:
        for number, text in read_lines(path, max_bytes=max_bytes):
            found.total += 1
            if found.total > max_lines:
                checker.refuse(
                    number,
                    "too_many_requests",
                    f"The file has more than {max_lines} requests (the setting files.max_batch_lines).",
                )
                return found
            checker.check(number, text)
    except TooLong as error:
        checker.refuse(int(error.args[0]), "line_too_long", f"The line is longer than {max_bytes} bytes.")
        return found
    if not found.total:
        checker.refuse(None, "empty_file", "The file has no requests.")
    return found


class _Checker:
    """Collects the faults of one file's lines."""

    def __init__(self, endpoint: str) -> None:
        self.found = Checked()
        self._endpoint = endpoint
        self._seen: dict[str, int] = {}
        """Number of the line by its custom id."""

    def refuse(self, number: int | None, code: str, message: str, param: str | None = None) -> None:
        self.found.errors.append(LineError(code=code, message=message, line=number, param=param))

    def check(self, number: int, text: bytes) -> None:
        try:
            text.decode("utf-8")
            line = _lines.decode(text)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at `$")
            self.refuse(number, "invalid_line", f"{message}.", path.rstrip("`").removeprefix(".") or None)
            return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
            self.refuse(number, "invalid_json_line", f"The line is not a JSON object in UTF-8: {reason}.")
            return
        length, name = len(line.custom_id), line.custom_id[:100]
        if not 1 <= length <= MAX_CUSTOM_ID:
            message = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters, got {length}."
            self.refuse(number, "invalid_custom_id", message, "custom_id")
        elif line.custom_id in self._seen:
            message = f"The custom_id `{name}` is that of line {self._seen[line.custom_id]} too."
            self.refuse(number, "duplicate_custom_id", message, "custom_id")
        elif line.method != "POST":
            self.refuse(number, "invalid_method", f"method must be POST, got `{line.method[:50]}`.", "method")
        elif line.url != self._endpoint:
            message = f"url must be the batch's endpoint, {self._endpoint}, got `{line.url[:100]}`."
            self.refuse(number, "invalid_url", message, "url")
        else:
            self._check_body(number, bytes(line.body))
        self._seen.setdefault(line.custom_id, number)

    def _check_body(self, number: int, body: bytes) -> None:
        if not body.startswith(b"{"):
            self.refuse(number, "invalid_body", "body must be a JSON object.", "body")
            return
        try:
            chosen = _choosers.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return  # the request's own answer names the field
        if chosen.stream:
            message = "stream must be left out or false: a batch's answers come whole."
            self.refuse(number, "unsupported_parameter", message, "body.stream")
        if chosen.background:
            message = "background must be left out or false: a batch is in the background as a whole."
            self.refuse(number, "unsupported_parameter", message, "body.background")
        if self.found.total == 1:
            self.found.model = chosen.model


def requests_of(path: Path, *, max_bytes: int) -> Iterator[NumberedLine]:
    """The requests of a file that was checked. Raises `OSError`."""
    for number, text in read_lines(path, max_bytes=max_bytes):
        line = _lines.decode(text)
        yield NumberedLine(number, line.custom_id, bytes(line.body))
