"""Only files that were sent along, and those under the roots."""

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("swapped", ["inner", "."])
def test_a_folder_that_becomes_a_link_later_is_not_followed(files: DataFiles, tmp_path: Path, swapped: str) -> None:
    """Between the check and the opening: the folder of the file, or the root itself, leads elsewhere."""
    found = files.find("inner/a.jsonl")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    for folder in (elsewhere, elsewhere / "inner"):
        (folder / "a.jsonl").write_text("secret\n")
    folder = (tmp_path / "root" / swapped).resolve()
    folder.rename(tmp_path / "moved")
    folder.symlink_to(elsewhere)
    with pytest.raises(InvalidRequest, match=r"inner/a\.jsonl cannot be read"):
        found.open()


def test_descriptors_that_run_out_are_not_the_recipe_s_fault(files: DataFiles) -> None:
    script = (
        "import os, resource, sys\nfrom pathlib import Path\nfrom runtime.errors import StorageUnavailable\n"
        "from runtime.trainer.data.files import DataFile\n"
        "path = Path(sys.argv[1])\nlast = os.open('/dev/null', os.O_RDONLY)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "try:\n    DataFile('a', path).open()\nexcept StorageUnavailable as error:\n    print(error.cause)\n"
    )
    path = files.find("inner/a.jsonl").path
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "too_many_files", done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "neither among"),
        ("inner", "is a folder"),
        ("inner/absent", "inner/absent is missing"),
        ("absent", "absent is missing"),
        ("inner/b.jsonl", "under a data root (did you mean inner/a.jsonl?). Send it along"),
        ("inner/A.JSONL", "did you mean inner/a.jsonl?"),
        ("a.json", "did you mean"),
        ("data/sentt.jsonl", "did you mean sent.jsonl?"),
        ("inner/link.jsonl", "did you mean link.jsonl?"),
    ],
)
def test_what_is_not_there(files: DataFiles, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as caught:
        files.find(name)
    assert caught.value.code == "data_not_found"
    assert "sent.jsonl" in caught.value.message or name == "inner"


def test_without_roots_and_files_nothing_is_there() -> None:
    with pytest.raises(InvalidRequest, match=r"a\.jsonl is missing") as caught:
        DataFiles().find("a.jsonl")
    assert caught.value.code == "data_not_found"
    with pytest.raises(Forbidden, match="may not be read"):
        DataFiles().find("/a.jsonl")


def test_what_is_forbidden_names_what_was_sent(files: DataFiles) -> None:
    with pytest.raises(Forbidden, match=r"Among the files sent along is sent\.jsonl"):
        files.find("/home/me/data/sentt.jsonl")


@pytest.mark.parametrize(
    "name", ["data/x.jsonl", "./data/x.jsonl", "/home/me/data/x.jsonl", "../data/x.jsonl", "x.jsonl"]
)
def test_a_file_is_known_by_its_base_name(tmp_path: Path, name: str) -> None:
    """curl sends `-F file=@data/x.jsonl` as `x.jsonl`."""
    (tmp_path / "stored").write_text("{}\n")
    files = DataFiles({"x.jsonl": tmp_path / "stored", "y.jsonl": tmp_path / "other"}, [tmp_path]).naming([name, "z"])
    assert files.find(name).path == tmp_path / "stored"
    assert files.find(name).name == name
    assert files.unused == ["y.jsonl"]


def test_a_base_name_that_two_files_share(tmp_path: Path) -> None:
    (tmp_path / "stored").write_text("sent\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text("root\n")

    def files(*sent: str) -> DataFiles:
        uploads = dict.fromkeys(sent, tmp_path / "stored")
        return DataFiles(uploads, [tmp_path]).naming(["a/x.jsonl", "b/x.jsonl"])

    for sent in (["x.jsonl"], ["c/x.jsonl", "d/x.jsonl"]):
        with pytest.raises(InvalidRequest, match=r"a/x\.jsonl: it is not clear .*curl: -F a/x\.jsonl=@FILE") as caught:
            files(*sent).find("a/x.jsonl")
        assert caught.value.code == "data_not_found"
    with files("x.jsonl").find("b/x.jsonl").open() as stream:  # which lies where the recipe says
        assert stream.read() == b"root\n"
    # One of them by its path, and the base name is the other one's.
    assert files("x.jsonl", "b/x.jsonl").find("a/x.jsonl").path == tmp_path / "stored"
    both = files("a/x.jsonl", "b/x.jsonl")
    assert (both.find("a/x.jsonl").name, both.find("b/x.jsonl").name, both.unused) == ("a/x.jsonl", "b/x.jsonl", [])


def test_patterns_stand_for_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    files = DataFiles(roots=[tmp_path])
    assert [file.name for file in files.find_all("*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [file.name for file in files.find_all("*/?.jsonl")] == ["deep/d.jsonl"]
    assert [file.name for file in files.find_all("[bc].*")] == ["b.jsonl", "c.csv"]
    assert [file.name for file in files.find_all("a.jsonl")] == ["a.jsonl"]
    with pytest.raises(InvalidRequest, match="is missing"):
        files.find_all("*.json")
    for outside in ("../*", "/etc/*", "deep/../../*"):
        with pytest.raises(Forbidden):
            files.find_all(outside)


def test_a_pattern_never_leads_out_by_a_link(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (other / "secret.jsonl").write_text("{}")
    (root / "link.jsonl").symlink_to(other / "secret.jsonl")
    with pytest.raises(Forbidden):
        DataFiles(roots=[root]).find_all("*.jsonl")


def test_patterns_of_what_was_sent(tmp_path: Path) -> None:
    paths = {name: tmp_path / str(index) for index, name in enumerate(("data/b.jsonl", "data/a.jsonl", "x/c.jsonl"))}
    for path in paths.values():
        path.write_text("{}")
    files = DataFiles(paths)
    assert [file.name for file in files.find_all("data/*.jsonl")] == ["data/a.jsonl", "data/b.jsonl"]
    assert files.unused == ["x/c.jsonl"]
    as_curl_sends = DataFiles({"a.jsonl": paths["data/a.jsonl"]})
    assert [file.name for file in as_curl_sends.find_all("data/*.jsonl")] == ["a.jsonl"]
