"""`eft adapters` against a real server with a tiny model."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime.cli.adapters import _unpack
from runtime.cli.output import CommandError
from settings.schema import TrainerSettings
from tests.adapter_files import make_adapter
from tests.api.conftest import RunningServer, tiny_settings
from tests.cli.conftest import Eft


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for seed in (1, 2):
        make_adapter(tiny_model, folder / str(seed), seed=seed, target_modules=["q_proj"])
    return folder


@pytest.fixture
def url(tiny_model: Path, folder: Path, tmp_path: Path) -> Iterator[str]:
    trainer = TrainerSettings(state_dir=str(tmp_path / "state"), data_roots=(str(folder),))
    settings = msgspec.structs.replace(tiny_settings(tiny_model, admin_key=("boss",)), trainer=trainer)
    with RunningServer(settings) as server:
        yield server.url


def test_upload(eft: Eft, url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")
    assert "a: version 1, served" in eft("adapters", "upload", "a", folder / "1", "--url", url).out
    again = eft("adapters", "upload", "a", folder / "2", "--json", "--url", url)
    assert json.loads(again.out)["current"] == 2
    for number in (1, 2):
        target = tmp_path / "out" / str(number)
        assert eft("adapters", "download", "a", "--version", number, "--output", target, "--url", url).code == 0
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (target / file).read_bytes() == (folder / str(number) / file).read_bytes()
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        (("b", tmp_path / "empty"), 2, "holds no adapter_config.json"),
        (("b", tmp_path / "absent"), 2, "holds no adapter_config.json"),
        (("a@1", folder / "1"), 1, "400: name must begin with a letter"),
    ):
        refused = eft("adapters", "upload", *arguments, "--url", url)
        assert (refused.code, message in refused.err) == (code, True), refused.err


def test_the_life_of_an_adapter(eft: Eft, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = eft("adapters", "list", "--url", url)
    assert (denied.code, denied.out) == (1, "")
    assert "401" in denied.err
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")

    def call(*arguments: object) -> str:
        done = eft("adapters", *arguments, "--url", url)
        assert done.code == 0, done.err
        return done.out

    assert "a: version 1, served" in call("load", "a", folder / "1")
    assert eft("adapters", "load", "a", folder / "2", "--url", url).code == 1
    assert "a: version 2, served" in call("load", "a", folder / "2", "--inplace")
    shown = json.loads(call("show", "a", "--json"))
    assert [version["current"] for version in shown["versions"]] == [False, True]
    assert "* 1" in call("promote", "a", 1)
    assert "also as latest" in call("alias", "a", "latest")
    assert json.loads(call("list", "--json"))["adapters"][0]["aliases"] == ["latest"]
    assert "latest" not in call("unalias", "a", "latest")
    assert eft("adapters", "unalias", "a", "latest", "--url", url).code == 1
    assert "25%" in call("canary", "a", 2, 0.25)
    assert json.loads(call("canary", "a", 2, 0, "--json"))["canary"] is None
    refused = eft("adapters", "canary", "a", 2, 1.5, "--url", url)
    assert (refused.code, refused.err) == (1, "eft: 400: weight must be from 0 to 1, got 1.5.\n")
    assert "a: version 2" in call("rollback", "a")
    assert "not served" in call("unload", "a")
    assert json.loads(call("list", "--json"))["adapters"][0]["served"] is False
    assert "a: version 2, served" in call("load", "a")
    assert call("list").splitlines()[1].split() == ["a", "2", "yes"]
    assert call("delete", "a", 1) == "Deleted a@1.\n"
    assert call("delete", "a") == "Deleted a.\n"
    assert json.loads(call("list", "--json")) == {"adapters": []}
    missing = eft("adapters", "show", "a", "--url", url)
    assert (missing.code, missing.err) == (1, "eft: 404: There is no adapter 'a'.\n")


def test_export(
    eft: Eft, url: str, folder: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")
    assert eft("adapters", "load", "a", folder / "1", "--url", url).code == 0
    done = eft("export", "a@1", "--to", tmp_path / "merged", "--model", tiny_model, "--url", url)
    assert done.code == 0, done.err
    assert f"a is in {tmp_path / 'merged'}: " in done.out
    assert "100.0% of" in done.out
    made = eft("export", folder / "1", "--to", tmp_path / "a.gguf", "--format", "gguf", "--type", "f16", "--json")
    found = json.loads(made.out)
    assert (found["format"], found["bytes"]) == ("gguf", (tmp_path / "a.gguf").stat().st_size)
    assert found["difference"]["same_tokens"] > 0.9
    for arguments, code, message in (
        (("a", "--to", tmp_path / "merged"), 2, "is there already"),
        (("a@x", "--to", tmp_path / "x"), 2, "expected NAME or NAME@VERSION"),
        (("b", "--to", tmp_path / "x"), 1, "404"),
        (("a", "--to", tmp_path / "x", "--type", "q4_k"), 1, "type: expected one of float32, float16, bfloat16"),
        ((folder / "1", "--to", tmp_path / "x", "--model", tmp_path), 1, "holds no config.json"),
    ):
        refused = eft("export", *arguments, "--url", url)
        assert (refused.code, message in refused.err) == (code, True), refused.err
    assert not (tmp_path / "x").exists()


def test_download_gives_a_folder_of_pefts(
    eft: Eft, url: str, folder: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")
    for number in ("1", "2"):
        assert eft("adapters", "load", "a", folder / number, "--inplace", "--url", url).code == 0
    shown = eft("adapters", "show", "a", "--url", url).out
    assert f"in {tmp_path / 'state' / 'adapters' / 'a' / '2'}\n" in shown
    done = eft("adapters", "download", "a", "--url", url)
    assert (done.code, done.out) == (0, "a@2 is in a: adapter_config.json, adapter_model.safetensors.\n")
    older = eft("adapters", "download", "a", "--version", 1, "--output", tmp_path / "out" / "older", "--url", url)
    assert older.code == 0
    for copied, number in ((tmp_path / "a", "2"), (tmp_path / "out" / "older", "1")):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (copied / file).read_bytes() == (folder / number / file).read_bytes()
    again = eft("adapters", "download", "a", "--url", url)
    assert (again.code, "is there already" in again.err) == (2, True)
    for arguments in (("other",), ("a", "--version", "9", "--output", "x")):
        missing = eft("adapters", "download", *arguments, "--url", url)
        assert (missing.code, "404" in missing.err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out", "state"]


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ({"format": "chat"}, ""),
        ({"format": "chat", "system": "Be brief."}, "asked as chat, with the system message 'Be brief.'\n"),
        ({"format": "alpaca", "template": "{instruction}"}, "asked as alpaca\n"),
        ({"format": "text"}, "asked as text\n"),
    ],
)
def test_show_says_how_an_adapter_is_asked(
    eft: Eft, url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: dict[str, str], line: str
) -> None:
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")
    trained = tmp_path / "state" / "data" / "trained"
    shutil.copytree(folder / "1", trained)
    (trained / "eft.json").write_text(json.dumps({"prompt": prompt}))
    assert eft("adapters", "load", "b", trained, "--url", url).code == 0
    shown = eft("adapters", "show", "b", "--url", url)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("b: version 1, served\nin ")
    asked = [text + "\n" for text in shown.out.splitlines() if text.startswith("asked")]
    assert "".join(asked) == line


def archive_of(*members: tuple[str, bytes]) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    stream.seek(0)
    return stream


@pytest.mark.parametrize(
    "members",
    [
        [("a/x", tarfile.SYMTYPE)],
        [("a/x", tarfile.FIFOTYPE)],
        [("a", tarfile.DIRTYPE)],
        [("..", tarfile.REGTYPE)],
        [("a/x", tarfile.REGTYPE), ("b/x", tarfile.REGTYPE)],
    ],
)
def test_an_archive_that_is_no_adapter_is_not_unpacked(members: list[tuple[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no adapter"):
        _unpack(archive_of(*members), tmp_path / "new")
    with pytest.raises(CommandError, match="no adapter"):
        _unpack(io.BytesIO(b"junk"), tmp_path / "other")


def test_an_archive_reaches_no_other_folder(tmp_path: Path) -> None:
    assert _unpack(archive_of(("../../x", tarfile.REGTYPE), ("/tmp/y", tarfile.REGTYPE)), tmp_path / "new") == [
        "x",
        "y",
    ]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x", "y"]


def test_no_server(eft: Eft) -> None:
    done = eft("adapters", "list", "--url", "http://127.0.0.1:9")
    assert done.code == 1
    assert "no server answers" in done.err
