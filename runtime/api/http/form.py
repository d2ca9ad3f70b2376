"""Multipart forms, read as they arrive: their segments, and of forms with one file its pieces and the fields."""

from collections.abc import AsyncIterator
from typing import Any

from litestar import Request
from multipart import MultipartError, ParserLimitReached, PushMultipartParser, parse_options_header

from runtime.api.http.body import check_encoding, content_type, receive_chunks
from runtime.errors import InvalidRequest, UnsupportedMediaType

MULTIPART = "multipart/form-data"

MAX_PARTS = 32
"""Most parts of a form."""

MAX_FIELD_BYTES = 16 * 1024
"""Bytes of one field that is not a file."""

OVERHEAD_BYTES = 1024 * 1024
"""Bytes that a form may have beside its file: fields, headers and boundaries."""


async def segments(
    chunks: AsyncIterator[bytes], boundary: str, *, max_parts: int, too_many: InvalidRequest
) -> AsyncIterator[Any]:
    """Segments of a form, each followed by its data in pieces and by None.

    Raises `InvalidRequest`: `too_many` for more than `max_parts`, or one with huge headers; others for a bad boundary
    and for a form that is malformed or truncated.
    """
    check_boundary(boundary)
    try:
        parser = PushMultipartParser(boundary, max_segment_count=max_parts, strict=True)
        async for chunk in chunks:
            if chunk:
                for event in parser.parse(chunk):
                    yield event
        parser.close()
    except ParserLimitReached:
        raise too_many from None
    except MultipartError:
        raise InvalidRequest("The multipart/form-data is malformed, or not complete.") from None


def check_boundary(boundary: str) -> None:
    """Raise `InvalidRequest` for a boundary that a form cannot have."""
    if not 1 <= len(boundary) <= 200:
        raise InvalidRequest("The multipart/form-data has no valid boundary.")


async def data_of(events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The data of the segment that has just begun."""
    async for data in events:
        if data is None:
            return
        yield data


class FormFile:
    """The file of a form, while its bytes arrive."""

    def __init__(self, part: str, filename: str, pieces: AsyncIterator[bytes]) -> None:
        self.part = part
        """Name of the form's part."""
        self.filename = filename
        self.pieces = pieces
        """The file's bytes; to be read to the end before the form goes on."""


class FormReader:
    """Reads one form. `fields` are complete once `files` has ended; `duplicate` fields are refused."""

    def __init__(self, request: Request[Any, Any, Any], *, max_file: int, timeout: float) -> None:
        """`timeout`: seconds in which a next piece must arrive. Raises `UnsupportedMediaType`, `InvalidRequest`."""
        check_encoding(request)
        media_type, options = parse_options_header(content_type(request))
        if media_type != MULTIPART:
            raise UnsupportedMediaType("Send a form with the file, with `Content-Type: multipart/form-data`.")
        boundary = options.get("boundary", "")
        check_boundary(boundary)
        self.fields: dict[str, str] = {}
        self._events = segments(
            receive_chunks(request, limit=max_file + OVERHEAD_BYTES, timeout=timeout),
            boundary,
            max_parts=MAX_PARTS,
            too_many=InvalidRequest(f"The form has more than {MAX_PARTS} parts, or a part with huge headers."),
        )

    async def files(self) -> AsyncIterator[FormFile]:
        """The form's files in their order, each to be read before the next. Raises `InvalidRequest` for a malformed or
        truncated form, and what `receive_chunks` raises."""
        async for segment in self._events:
            if segment.filename is None:
                await self._take_field(segment.name)
            else:
                yield FormFile(segment.name, segment.filename, data_of(self._events))

    async def _take_field(self, name: str) -> None:
        value = b""
        async for data in data_of(self._events):
            value += data
            if len(value) > MAX_FIELD_BYTES:
                raise InvalidRequest(
                    f"The form's field `{name[:100]}` must have at most {MAX_FIELD_BYTES} bytes.", param=name[:100]
                )
        if name in self.fields:
            raise InvalidRequest(f"The form has the field `{name[:100]}` twice.", param=name[:100])
        try:
            self.fields[name] = value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"The form's field `{name[:100]}` is not valid UTF-8.", param=name[:100]) from None
