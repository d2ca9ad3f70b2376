"""Files that are there and whole, or not there: under real limits, for this user alone, with all folders synced."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.support import durable
from runtime.support.durable import (
    error_code,
    fresh_directory,
    make_directory,
    move,
    pinned,
    replace_file,
    write_file,
    write_with,
)
from tests.limited import FULL_DISK, NO_DESCRIPTORS, run_limited


@contextmanager
def loose_umask() -> Iterator[None]:
    old = os.umask(0)
    try:
        yield
    finally:
        os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths that were synced, in order."""
    found: list[Path] = []

    def fsync(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr("os.fsync", fsync)
    return found


def test_everything_is_for_this_user_alone(tmp_path: Path) -> None:
    with loose_umask():
        make_directory(tmp_path / "a" / "b")
        write_file(tmp_path / "a" / "file", b"1")
        replace_file(tmp_path / "a" / "file", b"2")
        write_with(tmp_path / "a" / "other", lambda path: path.write_bytes(b"3"))
        with fresh_directory(tmp_path / "c" / "d") as folder:
            write_file(folder / "file", b"4")
    for path in tmp_path.rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_each_new_folder_s_parent_is_synced(tmp_path: Path, synced: list[Path]) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    make_directory(tmp_path / "a" / "b" / "c")
    assert synced == []
    with fresh_directory(tmp_path / "d" / "e") as folder:
        write_file(folder / "file", b"")
    assert synced[0] == tmp_path
    assert synced[1].name == "file"
    assert synced[2] == folder
    assert synced[3:] == [tmp_path / "d"]


def test_both_folders_of_a_move_are_synced(tmp_path: Path, synced: list[Path]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    move(tmp_path / "a" / "x", tmp_path / "b" / "y")
    assert synced == [tmp_path, tmp_path / "b", tmp_path / "a"]
    (tmp_path / "a" / "x").write_text("2")
    with pytest.raises(FileExistsError):
        move(tmp_path / "a" / "x", tmp_path / "b" / "y")
    assert (tmp_path / "b" / "y").read_text() == "1"


def test_a_file_that_cannot_be_replaced_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "file", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="broken"):
        replace_file(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


WRITE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from runtime.support.durable import error_code, write_file, write_with
folder = Path(sys.argv[1])
for name, write in {
    "ours": lambda path: write_file(path, bytes(1 << 20)),
    "safetensors": lambda path: write_with(path, lambda p: save_file({"x": torch.zeros(1 << 18)}, p)),
}.items():
    try:
        write(folder / name)
        print(name, "written")
    except OSError as error:
        print(name, error_code(error))
"""


def test_a_full_disk_is_named_whichever_library_writes(tmp_path: Path) -> None:
    out = run_limited(FULL_DISK.format(size=100_000) + WRITE, tmp_path)
    assert out.splitlines() == ["ours disk_full", "safetensors disk_full"]


def test_a_lack_of_descriptors_is_named_whichever_library_writes_and_reads(tmp_path: Path) -> None:
    reading = (
        "from safetensors.torch import load_file\nfrom runtime.support.durable import read_with\ndescriptors()\n"
        "save_file({'x': torch.zeros(1)}, folder / 'there')\nlast = no_descriptors()\n"
        "try:\n    read_with(folder / 'there', load_file)\n"
        "except OSError as error:\n    print('read', error_code(error))"
    )
    code = NO_DESCRIPTORS + WRITE.replace("for name", "last = no_descriptors()\nfor name") + reading
    out = run_limited(code, tmp_path)
    assert out.splitlines() == ["ours too_many_files", "safetensors too_many_files", "read too_many_files"]


def test_an_error_that_is_not_the_system_s_stays_what_it_is(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ValueError("no tensors (os error)")

    with pytest.raises(ValueError, match="no tensors"):
        write_with(tmp_path / "file", fail)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EFBIG, "disk_full"),
        (errno.EMFILE, "too_many_files"),
        (errno.ENFILE, "too_many_files"),
        (errno.EROFS, "storage_read_only"),
        (errno.EIO, "storage_unavailable"),
    ],
)
def test_names_of_errors(number: int, code: str) -> None:
    error = OSError(number, os.strerror(number), "/secret/path")
    assert error_code(error) == code
    found = durable.storage_unavailable("It cannot be stored", error)
    assert (found.cause, found.code, found.status) == (code, "storage_unavailable", 503)
    assert "/secret" not in found.message
    assert os.strerror(number) in found.message


def test_a_pinned_folder_stays_what_it_was(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path, text in ((folder, "ours"), (other, "secret")):
        path.mkdir()
        (path / "file").write_text(text)
    with pinned(folder) as there:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(other)
        assert (there / "file").read_text() == "ours"
        assert there.is_dir()
    for leads_out in (folder, folder / "inner", other / "file", tmp_path / "none"):
        (other / "inner").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=r"Errno"), pinned(leads_out):
            raise AssertionError("it was opened")
