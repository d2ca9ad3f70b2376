"""Files between the server and the ranks of a launched job: the job as ranks read it, and what they report.

All lie in one folder of the job. The server writes `spec.json`, `feed.msgpack`, `initial/` and `request`; rank 0 writes
reports (MessagePack, each behind its length), and snapshots, which the server takes as checkpoints. Nothing is pickled.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.events import RunEvent
from runtime.support.durable import PRIVATE_FILE, as_os_errors, make_directory, reason, remove, replace_file
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.launch import Launch
from runtime.trainer.schedule import ExampleFeed, Schedule

SPEC, FEED, INITIAL, REQUEST, LOG, END = "spec.json", "feed.msgpack", "initial", "request", "ranks.log", "end.json"
SNAPSHOTS = "snapshots"
"""Folder of the snapshots that the server has not taken yet."""
MEETING = "meeting"
"""File by which the agents of one node meet. One that an earlier life of torchrun has left says that they have met."""
BEST = "best.safetensors"
PLACE = "place-"
"""Begin of the name of a rank's file with where it is."""
MODEL = "model_files"
"""Folder of a whole model in a result."""
STEP = "step-"
"""Begin of the name of a checkpoint's folder."""
PAUSE = b"pause"
RESTARTS = 100
"""Restarts of one launch by torchrun itself, which are on several nodes alone."""


class ModelFiles(Struct, frozen=True, kw_only=True):
    """The served model, as transformers reads it."""

    directory: str
    gguf: str | None = None
    """File in the directory, where that is a GGUF file."""


class LaunchSpec(Struct, frozen=True, kw_only=True):
    """One launched job, apart from its data."""

    recipe: Recipe
    schedule: Schedule
    launch: Launch
    model: ModelFiles
    device: str
    """cpu or cuda; the rank's own one of the visible devices."""
    checkpoints: str
    """Folder of the job's checkpoints, whose newest a run goes on from."""
    vocab_size: int
    deepspeed: dict[str, object] | None = None
    """DeepSpeed's configuration; None for another method."""
    chat_template: str | None = None
    """Template to write with a whole model; None: the model's own."""
    threads: int = 1
    """Threads of each rank."""
    attempt: int = 0
    """Number of the launch. With torchrun's own restarts, `RESTARTS` of them at most, it names the file of reports."""


class RankReport(Struct, frozen=True):
    """A line of rank 0's reports."""

    event: RunEvent
    snapshot: str | None = None
    """Folder in `SNAPSHOTS`, where the event announces one."""


class LaunchEnd(Struct, frozen=True, kw_only=True):
    """Outcome of torchrun, where it ended by itself."""

    crashed: bool
    """True where a rank was killed, so that another attempt makes sense; False where its program raised an error."""
    message: str
    code: str = "internal_error"


KILLED = LaunchEnd(crashed=True, message="a rank was killed")
FAILED = LaunchEnd(
    crashed=False,
    message="The processes of this job ended with an error that they could not write down, as where a disk is full; "
    f"{LOG} in the job's folder on the server has their output.",
)
KILLED_CODE, FAILED_CODE = 1, 3
"""Exit codes of torchrun's agent where a rank was killed, and where an error was raised; the latter also of ranks."""

ERROR_BYTES = 4096
"""Room that a rank takes for its last error while the disk has some."""
_LENGTH_BYTES = 4


def framed(report: RankReport) -> bytes:
    """A report as it stands in the file of reports."""
    data = msgspec.msgpack.encode(report)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


class ReportReader:
    """Reads the reports of one launch while they are written. Blocks."""

    def __init__(self, folder: "JobFolder", attempt: int) -> None:
        self._folder = folder
        self._number = attempt * RESTARTS
        self._begin()

    def _begin(self) -> None:
        self._path = self._folder.reports(self._number)
        self._offset = 0
        self._rest = b""

    def read(self) -> list[RankReport]:
        """The reports since the last call, as far as they are whole, those after a restart too. Raises `OSError`,
        `msgspec.MsgspecError`."""
        found = self._read()
        while self._folder.reports(self._number + 1).exists():
            self._number += 1
            self._begin()
            found += self._read()
        return found

    def _read(self) -> list[RankReport]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        self._rest += data
        found = []
        while len(self._rest) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._rest[:_LENGTH_BYTES], "little")
            if len(self._rest) < end:
                break
            found.append(msgspec.msgpack.decode(self._rest[_LENGTH_BYTES:end], type=RankReport))
            self._rest = self._rest[end:]
        return found


class JobFolder:
    """Paths in the folder, and the files that both sides know. Everything but paths blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def initial(self) -> Path:
        """Adapter in PEFT's format that the training starts from, with its card."""
        return self.path / INITIAL

    @property
    def log(self) -> Path:
        """All that torchrun and ranks print. Beside the folder, which is deleted when the job ends."""
        return self.path.with_name(LOG)

    @property
    def best(self) -> Path:
        """Parameters of the best evaluation so far."""
        return self.path / BEST

    @property
    def meeting(self) -> Path:
        return self.path / MEETING

    def reports(self, attempt: int) -> Path:
        return self.path / f"reports-{attempt}"

    def snapshot(self, name: str) -> Path:
        return self.path / SNAPSHOTS / name

    # -- the server's side ---------------------------------------------------------------------

    def write(self, spec: LaunchSpec, feed: ExampleFeed) -> None:
        """Write the job for its ranks. Raises `OSError`."""
        make_directory(self.path / SNAPSHOTS)
        replace_file(self.path / FEED, msgspec.msgpack.encode(feed))
        self.write_spec(spec)

    def write_spec(self, spec: LaunchSpec) -> None:
        replace_file(self.path / SPEC, msgspec.json.encode(spec))

    def clear(self) -> None:
        """Delete what earlier launches have left, but for `clear_attempt`'s part."""
        for path in (self.path / REQUEST, *self.path.glob("reports-*")):
            remove(path)
        for path in (self.path / SNAPSHOTS).glob("*"):
            remove(path)

    def clear_attempt(self) -> None:
        """Delete what one life of torchrun has left, before the next one: how it ended, and where its agents met."""
        for path in (self.meeting, self.path / END, *self.path.glob("error-*.json"), *self.path.glob(f"{PLACE}*")):
            remove(path)

    def request(self, what: bytes) -> None:
        """Ask the ranks for something at the next step's end. Raises `OSError`."""
        replace_file(self.path / REQUEST, what)

    def end(self) -> LaunchEnd | None:
        """Outcome of torchrun; None where it was killed, or still runs."""
        try:
            return msgspec.json.decode((self.path / END).read_bytes(), type=LaunchEnd)
        except (OSError, msgspec.MsgspecError):
            return None

    def last_lines(self, size: int = 2000) -> str:
        """The end of the log, of at most `size` bytes."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    # -- the ranks' side -----------------------------------------------------------------------

    def read_spec(self) -> LaunchSpec:
        return msgspec.json.decode((self.path / SPEC).read_bytes(), type=LaunchSpec)

    def read_feed(self) -> ExampleFeed:
        return msgspec.msgpack.decode((self.path / FEED).read_bytes(), type=ExampleFeed)

    def requested(self) -> bytes:
        """Request of the server; empty for none."""
        with contextlib.suppress(OSError):
            return (self.path / REQUEST).read_bytes()
        return b""

    def take_best(self, source: Path) -> None:
        """Have the best parameters be those of a file of a checkpoint, which is never changed."""
        remove(self.best)
        os.link(source, self.best)

    def reserve_error(self, rank: int) -> None:
        """Take room for an error of a rank, which may come because a disk is full. Raises `OSError`."""
        (self.path / f"error-{rank}.json").write_bytes(b" " * ERROR_BYTES)

    def write_error(self, rank: int, end: LaunchEnd) -> None:
        """Note the error that ends a rank, in the reserved room where there is some. Raises `OSError`."""
        data = msgspec.json.encode(end).ljust(ERROR_BYTES)
        file = os.open(self.path / f"error-{rank}.json", os.O_WRONLY | os.O_CREAT, PRIVATE_FILE)
        try:
            os.pwrite(file, data, 0)
        finally:
            os.close(file)

    def first_error(self) -> LaunchEnd | None:
        """The first error that a rank has noted."""
        for path in sorted(self.path.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns):
            with contextlib.suppress(msgspec.MsgspecError):  # room that nothing was written to
                return msgspec.json.decode(path.read_bytes(), type=LaunchEnd)
        return None

    def write_end(self, end: LaunchEnd) -> None:
        """Note how torchrun ended."""
        replace_file(self.path / END, msgspec.json.encode(end))


@contextmanager
def stating_room(path: Path, size: int) -> Iterator[None]:
    """Context of a write of `size` bytes, whose `OSError` says so: the file, its bytes, and those that are free."""
    try:
        with as_os_errors(path):
            yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        text = f"{reason(error)}: {path.name} takes {size:,} bytes, and {free:,} are free"
        raise OSError(error.errno, text, str(path)) from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a job's folder of them."""
    found = [path for path in folder.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix(STEP)), default=None)
