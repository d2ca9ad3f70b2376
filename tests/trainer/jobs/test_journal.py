"""A job's log on a full disk, after a process that was killed in the middle of a line, and at the end of one."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import StorageUnavailable
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs import followers
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.followers import Journal, append, mend, tail
from runtime.trainer.jobs.records import JobEvent
from tests.limited import FULL_DISK, run_limited
from tests.trainer.jobs.journals import event


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "job" / "log.jsonl"
    assert append(path, [event(1), event(2)])
    return path


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"number": 3, "mess', b'{"number"', b"\0\0\0\0", b'{"other": 3}\n', b"nonsense\n{", b'"text"\n[1]\n'],
)
def test_what_is_torn_is_cut_off_and_the_rest_stays(log: Path, torn: bytes) -> None:
    with log.open("ab") as file:
        file.write(torn)
    assert mend(log) == 2
    assert append(log, [event(3)])
    assert numbers(log) == [1, 2, 3]


@pytest.mark.parametrize("content", [b"", b'{"num', b"nonsense\n"])
def test_a_log_of_which_nothing_is_whole_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    assert mend(tmp_path / "log.jsonl") == 0
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_no_log(tmp_path: Path) -> None:
    assert mend(tmp_path / "log.jsonl") == 0
    assert tail(tmp_path / "log.jsonl", 10) == b""


def test_a_full_disk_leaves_whole_lines(log: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom runtime.trainer.jobs.followers import append\n"
        "from tests.trainer.jobs.journals import event\n"
        + FULL_DISK.format(size=log.stat().st_size + 150)
        + "log, two = Path(sys.argv[1]), [event(3), event(4)]\n"
        + "print([append(log, two), append(log, two)], append(log, two[:1]))"
    )
    assert run_limited(code, log) == "[False, False] True"
    assert numbers(log) == [1, 2, 3]
    assert mend(log) == 3


def test_the_last_lines(log: Path) -> None:
    for number in range(3, 40):
        append(log, [event(number)])
    assert [json.loads(line)["number"] for line in tail(log, 3).splitlines()] == [37, 38, 39]
    found: Any = tail(log, 1000)
    assert len(found.splitlines()) == 39


class Rows:
    """The store, as the journal reads it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.failing = False

    async def events_after(self, job_id: str, number: int, limit: int) -> list[JobEvent]:
        if self.failing:
            raise StorageUnavailable("the database cannot be read")
        return [event(one) for one in range(number + 1, self.count + 1)][:limit]

    async def record(self, job_id: str) -> None:
        return None


def journal_of(rows: Rows, directories: JobDirectories, told: list[int] | None = None) -> Journal:
    """`told` gets the numbers of events as they are told."""
    on_event = (lambda job_id, one: None) if told is None else (lambda job_id, one: told.append(one.number))
    return Journal(rows, directories, WorkerThread(), on_event)  # type: ignore[arg-type]


@pytest.mark.anyio
@pytest.mark.parametrize("lands", [True, False])
async def test_a_journal_that_is_cancelled_in_a_write_loses_and_repeats_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    rows, directories = Rows(3), JobDirectories(tmp_path)
    begun, goes_on = threading.Event(), threading.Event()

    def slow_append(path: Path, events: Iterable[JobEvent]) -> bool:
        begun.set()
        goes_on.wait(30)
        return lands and append(path, events)

    told: list[int] = []
    monkeypatch.setattr(followers, "append", slow_append)
    journal = journal_of(rows, directories, told)
    journal.touch("job")
    running = asyncio.create_task(journal.run())
    assert await asyncio.to_thread(begun.wait, 30)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    monkeypatch.setattr(followers, "append", append)
    goes_on.set()
    await journal.flush()
    assert numbers(directories.log("job")) == [1, 2, 3]
    assert told == [1, 2, 3]


@pytest.mark.anyio
async def test_lines_of_a_database_that_could_not_be_read_are_written_later(tmp_path: Path) -> None:
    rows, directories = Rows(2), JobDirectories(tmp_path)
    journal = journal_of(rows, directories)
    rows.failing = True
    journal.touch("job")
    with pytest.raises(StorageUnavailable):
        await journal.flush()
    rows.failing = False
    await journal.flush()
    assert numbers(directories.log("job")) == [1, 2]
