"""The append-only files of a batch: what is whole is kept, what is torn is cut off, a full disk loses nothing."""

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.batches import output
from runtime.batches.output import ERRORS, OUTPUT, AppendedFile, BatchOutput, answer_line, error_line
from runtime.batches.records import Answer, LineError
from runtime.support import failpoints

pytestmark = pytest.mark.anyio


def line(custom_id: str) -> bytes:
    return answer_line(custom_id, Answer(status=200, body=b'{"text": "a"}', request_id="r"))


def ids(path: Path) -> list[str]:
    return [json.loads(text)["custom_id"] for text in path.read_bytes().splitlines()]


async def test_answers_are_there_when_they_are_opened_again(tmp_path: Path) -> None:
    first = BatchOutput(tmp_path)
    await first.open()
    await asyncio.gather(*(first.add(OUTPUT, str(number), line(str(number))) for number in range(50)))
    await first.add(ERRORS, "bad", error_line("bad", LineError(code="x", message="y")))
    assert (first.counts.completed, first.counts.failed) == (50, 1)
    await first.close()
    again = BatchOutput(tmp_path)
    await again.open()
    assert again.answered == {*map(str, range(50)), "bad"}
    assert (again.counts.completed, again.counts.failed) == (50, 1)
    await again.close()


@pytest.mark.parametrize("torn", [b"{", b'{"id": "a", "custom_id": "2", "response": nul', b"\0\0\0\n", b"x\n"])
async def test_a_torn_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    whole = line("1")
    (tmp_path / OUTPUT).write_bytes(whole + torn)
    opened = BatchOutput(tmp_path)
    await opened.open()
    assert opened.answered == {"1"}
    await opened.add(OUTPUT, "2", line("2"))
    await opened.close()
    assert ids(tmp_path / OUTPUT) == ["1", "2"]


async def test_a_write_that_fails_in_the_middle_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = AppendedFile(tmp_path / OUTPUT)
    opened.append([line("1")])
    real, calls = os.pwrite, list[int]()

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="No space"):
        opened.append([line("2")])
    assert ids(tmp_path / OUTPUT) == ["1"]
    opened.append([line("3")])
    opened.close()
    assert ids(tmp_path / OUTPUT) == ["1", "3"]
    assert len(calls) > 3


async def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "RETRY_SECONDS", 0.001)
    real, refusals = AppendedFile.append, iter([True] * 5)

    def append(self: AppendedFile, lines: list[bytes]) -> None:
        if next(refusals, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, lines)

    monkeypatch.setattr(AppendedFile, "append", append)
    opened = BatchOutput(tmp_path)
    await opened.open()
    await asyncio.gather(*(opened.add(OUTPUT, str(number), line(str(number))) for number in range(20)))
    await opened.close()
    assert sorted(ids(tmp_path / OUTPUT), key=int) == [str(number) for number in range(20)]


async def test_closing_does_not_wait_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, lines: list[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AppendedFile, "append", refuse)
    opened = BatchOutput(tmp_path)
    await opened.open()
    adding = asyncio.create_task(opened.add(OUTPUT, "1", line("1")))
    await asyncio.sleep(0)
    await opened.close()
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    assert opened.answered == set()
    assert (tmp_path / OUTPUT).read_bytes() == b""


async def test_a_caller_that_leaves_does_not_undo_its_line(tmp_path: Path) -> None:
    opened = BatchOutput(tmp_path)
    await opened.open()
    adding = asyncio.create_task(opened.add(OUTPUT, "1", line("1")))
    await asyncio.sleep(0)
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    await opened.settle()
    assert opened.answered == {"1"}
    await opened.close()
    assert ids(tmp_path / OUTPUT) == ["1"]


def test_a_body_of_several_lines_becomes_one() -> None:
    body = b'{\n  "text": "a\\nb"\n}\n'
    written = answer_line("1", Answer(status=200, body=body, request_id="r"))
    assert written.count(b"\n") == 1
    assert json.loads(written)["response"]["body"] == {"text": "a\nb"}


def test_a_sync_that_fails_takes_the_lines_back(tmp_path: Path) -> None:
    opened = AppendedFile(tmp_path / OUTPUT)
    failpoints.configure("batches.before_sync=raise:1")
    try:
        with pytest.raises(failpoints.FailpointError):
            opened.append([line("1")])
    finally:
        failpoints.configure("")
    assert (tmp_path / OUTPUT).read_bytes() == b""
    opened.close()
