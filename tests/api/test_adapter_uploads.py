"""Uploads of adapters: forms and archives that are adapters, and many that are not."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from runtime.api.admin.archives import MAX_ENTRIES, MAX_EXTENSION
from settings.schema import AdapterSettings
from tests.adapter_files import make_adapter, peft_greedy
from tests.api.adapter_requests import ASK, adapter_settings, answer, error
from tests.api.conftest import RunningServer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(tiny_model, folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def running(tiny_model: Path, folder: Path, state: Path) -> Iterator[RunningServer]:
    settings = adapter_settings(tiny_model, state, folder)
    adapters = AdapterSettings(max_loaded=2, max_lora_rank=16, max_adapter_upload=LIMIT)
    with RunningServer(msgspec.structs.replace(settings, adapters=adapters)) as server:
        yield server


@pytest.fixture
def http(running: RunningServer, state: Path) -> Iterator[httpx.Client]:
    """A client; afterwards the server has no adapters, and nothing lies about."""
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
        for adapter in client.get("/admin/adapters").json()["adapters"]:
            assert client.delete(f"/admin/adapters/{adapter['name']}?drain=1").status_code == 200
    incoming = state / "adapters" / ".incoming"
    assert not incoming.exists() or not list(incoming.iterdir())


Entry = tuple[str, bytes] | tarfile.TarInfo


def tar(*entries: Entry, format: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def files_of(folder: Path) -> list[Entry]:
    return [(name, (folder / name).read_bytes()) for name in (CONFIG, WEIGHTS)]


def send(http: httpx.Client, body: bytes, name: str = "a", kind: str = "application/x-tar") -> httpx.Response:
    return http.post("/admin/adapters/upload", params={"name": name}, content=body, headers={"content-type": kind})


def send_form(
    http: httpx.Client, files: list[Any], name: str | None = "a", data: dict[str, str] | None = None
) -> httpx.Response:
    query = {} if name is None else {"name": name}
    return http.post("/admin/adapters/upload", params=query, files=files, data=data)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("zipped", [False, True])
def test_an_archive_becomes_the_next_version(
    http: httpx.Client, tiny_model: Path, folder: Path, format: int, zipped: bool
) -> None:
    numbers = []
    for name in ("one", "two"):
        deep = "a" * 60 + "/" + "b" * 60  # too long for a header of the older format
        inside = f"{deep}/{name}" if format != tarfile.USTAR_FORMAT else name
        entries = [(f"{inside}/{file}", data) for file, data in files_of(folder / name)]  # type: ignore[misc]
        body = tar(special("./", tarfile.DIRTYPE), (f"{inside}/README.md", b"hello"), *entries, format=format)
        kind = "application/gzip" if zipped else "application/x-tar"
        added = send(http, gzip.compress(body) if zipped else body, kind=kind)
        assert added.status_code == 201, added.text
        numbers.append(added.json()["current"])
        assert added.headers["x-eft-warning"] == f"no part of the adapter, left out: {inside}/README.md"
        expected = peft_greedy(tiny_model, folder / name, ASK["prompt"], 8)
        assert answer(http, "a") == answer(http, f"a@{numbers[-1]}") == expected
    assert numbers[1] == numbers[0] + 1


def test_a_form_of_files_and_a_form_with_an_archive(http: httpx.Client, tiny_model: Path, folder: Path) -> None:
    expected = peft_greedy(tiny_model, folder / "one", ASK["prompt"], 8)
    entries = files_of(folder / "one")
    added = send_form(http, [("file", (f"mine/{name}", data)) for name, data in entries], None, {"name": "a"})  # type: ignore[misc]
    assert added.status_code == 201, added.text
    assert (added.json()["name"], answer(http, "a")) == ("a", expected)
    packed = ("file", ("mine.tar.gz", gzip.compress(tar(*entries))))
    assert send_form(http, [packed], "b").status_code == 201
    assert answer(http, "b") == expected


def test_an_export_can_be_uploaded(http: httpx.Client, folder: Path) -> None:
    assert send(http, tar(*files_of(folder / "one"))).status_code == 201
    exported = http.get("/admin/adapters/a/export").content
    assert send(http, exported, name="b").status_code == 201
    versions = [http.get(f"/admin/adapters/{name}").json()["versions"][0]["sha256"] for name in ("a", "b")]
    assert versions[0] == versions[1]


def test_an_adapter_may_be_called_upload(http: httpx.Client, folder: Path) -> None:
    assert send(http, tar(*files_of(folder / "one")), name="upload").status_code == 201
    assert http.get("/admin/adapters/upload").json()["name"] == "upload"
    assert http.delete("/admin/adapters/upload?drain=1").json() == {"id": "upload", "deleted": True}
    assert http.get("/admin/adapters/upload").status_code == 404


BAD = {
    "zip slip": (tar(("../evil", b"x")), "../evil"),
    "zip slip in the middle": (tar(("a/../../evil", b"x")), "a/../../evil"),
    "absolute": (tar(("/etc/passwd", b"x")), "/etc/passwd"),
    "of another system": (tar((r"..\evil", b"x")), r"..\evil"),
    "a drive": (tar(("C:evil", b"x")), "C:evil"),
    "control characters": (tar(("a\nb", b"x")), "a\nb"),
    "a folder that leads out": (tar(special("../out", tarfile.DIRTYPE)), "../out"),
    "symlink": (tar(special(WEIGHTS, tarfile.SYMTYPE, "/etc/passwd")), WEIGHTS),
    "hard link": (tar(special(WEIGHTS, tarfile.LNKTYPE, CONFIG)), WEIGHTS),
    "device": (tar(special("null", tarfile.CHRTYPE)), "null"),
    "block device": (tar(special("sda", tarfile.BLKTYPE)), "sda"),
    "pipe": (tar(special("pipe", tarfile.FIFOTYPE)), "pipe"),
    "sparse": (tar(special("holes", tarfile.GNUTYPE_SPARSE), format=tarfile.GNU_FORMAT), "holes"),
    "twice": (tar(("a/x", b"1"), ("a/x", b"2")), "a/x"),
    "twice, spelt differently": (tar(("x", b"1"), (".//x", b"2")), ".//x"),
    "a long name that leads out": (tar(("a/" * 100 + "../" * 101 + "evil", b"x")), None),
    "too many": (tar(*[(f"f{n}", b"") for n in range(MAX_ENTRIES + 1)]), f"f{MAX_ENTRIES}"),
    "two adapters": (tar((f"a/{CONFIG}", b"{}"), (f"b/{CONFIG}", b"{}")), f"b/{CONFIG}"),
    "a name for all entries": (
        tarfile.TarInfo.create_pax_global_header({"path": "evil"}) + tar(("x", b"1")),
        "path",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_refused_names_the_entry(http: httpx.Client, state: Path, case: str, zipped: bool) -> None:
    body, entry = BAD[case]
    before = sorted(state.parent.rglob("*"))
    refused = send(http, gzip.compress(body) if zipped else body)
    assert refused.status_code == 400, refused.text
    detail = refused.json()["error"]
    if entry is not None:
        assert (detail["param"], entry in detail["message"]) == (entry, True)
    assert http.get("/admin/adapters").json() == {"adapters": []}
    after = [path for path in sorted(state.parent.rglob("*")) if ".incoming" not in path.parts]
    assert [path for path in after if path not in before] == []


def test_names_in_a_form_are_checked_as_well(http: httpx.Client) -> None:
    for name in ("../evil", "/etc/passwd"):
        assert error(send_form(http, [("file", (name, b"x"))]))[:2] == (400, name)
    assert "of another system" in send_form(http, [("file", (r"a\b", b"x"))]).json()["error"]["message"]
    twice = [("file", ("x", b"1")), ("file", ("x", b"2"))]
    assert error(send_form(http, twice))[:2] == (400, "x")
    assert error(send_form(http, twice[:1], "a", {"other": "x"}))[:2] == (400, "other")


def test_bombs(http: httpx.Client) -> None:
    zeros = gzip.compress(tar((WEIGHTS, bytes(2 * LIMIT))))
    assert len(zeros) < LIMIT // 100
    bomb = send(http, zeros)
    assert bomb.status_code == 413
    assert f"larger than {LIMIT} bytes (adapters.max_adapter_upload)" in bomb.json()["error"]["message"]
    assert send(http, tar((WEIGHTS, bytes(2 * LIMIT)))).status_code == 413
    assert send_form(http, [("file", ("x", bytes(LIMIT + 1)))]).status_code == 413
    # A header that tarfile would read into memory whole.
    huge = tarfile.TarInfo("pax")
    huge.type, huge.size = tarfile.XHDTYPE, MAX_EXTENSION + 1
    refused = send(http, huge.tobuf(tarfile.USTAR_FORMAT) + bytes(MAX_EXTENSION + 1024))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pax")


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", "application/x-tar", 400, "empty"),
        (b"\x1f\x8b" + os.urandom(100), "application/gzip", 400, "not valid gzip"),
        (b"not a tar" * 100, "application/x-tar", 400, "no tar archive"),
        (tar(("x", b"1")), "application/zip", 415, "tar archive, plain or gzipped"),
        (tar(("README.md", b"1")), "application/x-tar", 400, f"has no {CONFIG}"),
        (tar((CONFIG, b"{}")), "application/x-tar", 400, f"no {WEIGHTS}"),
        (tar((CONFIG, b"{}"), ("adapter_model.bin", b"x")), "application/x-tar", 400, "pickle"),
        (tar((CONFIG, b"{"), (WEIGHTS, b"x")), "application/x-tar", 400, CONFIG),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400, "malformed, or not complete"),
    ],
)
def test_what_is_no_adapter(http: httpx.Client, body: bytes, kind: str, status: int, message: str) -> None:
    refused = send(http, body, kind=kind)
    assert refused.status_code == status, refused.text
    assert message in refused.json()["error"]["message"]
    assert http.get("/admin/adapters").json() == {"adapters": []}


def test_an_archive_that_is_cut_anywhere(http: httpx.Client, folder: Path) -> None:
    whole = tar(*files_of(folder / "one"))
    for body in (whole, gzip.compress(whole)):
        for cut in (1, 300, 1500, len(body) // 2):
            refused = send(http, body[:cut])
            assert refused.status_code == 400, (cut, refused.text)
    assert http.get("/admin/adapters").json() == {"adapters": []}


def test_names_of_adapters(http: httpx.Client, tiny_model: Path, folder: Path) -> None:
    body = tar(*files_of(folder / "one"))
    for name in (tiny_model.name, "../x", "a@1", ""):
        assert error(send(http, body, name=name))[:2] == (400, "name"), name
    files = [("file", (name, data)) for name, data in files_of(folder / "one")]  # type: ignore[misc]
    assert error(send_form(http, files, None))[:2] == (400, "name")
    assert error(send_form(http, files, "a", {"name": "b"}))[:2] == (400, "name")
    unknown = http.post("/admin/adapters/upload?nmae=a", content=body, headers={"content-type": "application/x-tar"})
    assert error(unknown)[:2] == (400, "nmae")


def test_an_adapter_that_does_not_fit_leaves_the_old_version(
    http: httpx.Client, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    assert send(http, tar(*files_of(folder / "one"))).status_code == 201
    config = json.loads((folder / "two" / CONFIG).read_text())
    bad = tar((CONFIG, json.dumps({**config, "r": 4096}).encode()), (WEIGHTS, (folder / "two" / WEIGHTS).read_bytes()))
    assert error(send(http, bad)) == (400, None, "invalid_adapter")
    assert answer(http, "a") == peft_greedy(tiny_model, folder / "one", ASK["prompt"], 8)


def test_leftovers_of_a_crash_are_deleted_at_the_next_start(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "state" / "adapters" / ".incoming" / "0.partial-abc"
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"x")
    with RunningServer(adapter_settings(tiny_model, tmp_path / "state", folder)):
        assert not left.exists()
