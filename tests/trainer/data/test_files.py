"""Only files that were sent along, and those under the roots."""

import os
from pathlib import Path

import pytest

from runtime.errors import Forbidden, InvalidRequest
from runtime.trainer.data.files import DataFiles


@pytest.fixture
def files(tmp_path: Path) -> DataFiles:
    """A root with a file and ways out of it, beside a file that is nobody's."""
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("secret\n")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "b.jsonl").write_text("{}\n")
    (root / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "outside").symlink_to(tmp_path)
    (root / "link.jsonl").symlink_to(root / "inner" / "a.jsonl")
    (root / "loop.jsonl").symlink_to(root / "loop.jsonl")
    (root / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jsonl")
    (tmp_path / "stored-0001").write_text("{}\n")
    return DataFiles(uploads={"sent.jsonl": tmp_path / "stored-0001"}, roots=[root])


@pytest.mark.parametrize("name", ["inner/a.jsonl", "./inner/../inner/a.jsonl", "link.jsonl", "sent.jsonl"])
def test_what_is_allowed(files: DataFiles, name: str) -> None:
    with files.find(name).open() as stream:
        assert stream.read() == b"{}\n"


def test_an_absolute_path_under_a_root(files: DataFiles) -> None:
    assert files.find(str(Path(files.roots[0]) / "inner" / "a.jsonl")).path.name == "a.jsonl"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/etc/absent.jsonl",
        "/dev/zero",
        "/proc/self/environ",
        "../secret.jsonl",
        "inner/../../secret.jsonl",
        "../root-2/b.jsonl",
        "outside/secret.jsonl",
        "out.jsonl",
        "zero.jsonl",
        "https://example.com/a.jsonl",
        "s3://bucket/a.jsonl",
        "file:///etc/passwd",
        "tatsu-lab/alpaca",
        "a\0.jsonl",
        "x" * 5000,
    ],
)
def test_what_is_forbidden(files: DataFiles, name: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match=r"trainer\.data_roots") as caught:
        files.find(name, param="datasets[0].path").open()
    assert (caught.value.status, caught.value.param) == (403, "datasets[0].path")
    assert str(tmp_path) not in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_pipe_neither_blocks_nor_is_read(files: DataFiles) -> None:
    with pytest.raises(Forbidden, match="not a regular file"):
        files.find("pipe.jsonl").open()


def test_a_link_that_is_put_there_later_is_not_followed(files: DataFiles, tmp_path: Path) -> None:
    found = files.find("inner/a.jsonl")
    found.path.unlink()
    found.path.symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InvalidRequest, match=r"inner/a\.jsonl cannot be read"):
        found.open()


@pytest.mark.parametrize(("name", "message"), [("absent.jsonl", "neither among"), ("inner", "is a folder")])
def test_what_is_not_there(files: DataFiles, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        files.find(name)
    assert caught.value.code == "data_not_found"
    assert "sent.jsonl" in caught.value.message or name == "inner"


def test_without_roots_and_files_nothing_is_allowed() -> None:
    with pytest.raises(Forbidden, match="may not be read"):
        DataFiles().find("a.jsonl")
