"""Which key is whose, and keys that come and go while the server runs."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from runtime.access import Access
from runtime.access.keys import KeyLimits, KeyRing, KeysFileError, StoredKey, change_keys, digest_of
from settings.api import ServerSettings
from settings.schema import Settings


def write(path: Path, *names: str, scope: Any = "inference", limits: Any = None) -> None:
    keys = [
        StoredKey(
            name=name,
            scopes=(scope,),
            sha256=digest_of(f"key of {name}".encode()),
            created="2026",
            **({"limits": limits} if limits else {}),
        )
        for name in names
    ]
    change_keys(path, lambda _: keys)


def key_of(name: str) -> bytes:
    return f"key of {name}".encode()


def access_of(path: Path) -> Access:
    return Access(Settings(server=ServerSettings(keys_file=str(path))))


def test_settings_and_file_and_token(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, "alice", scope="train")
    ring = KeyRing(("first", "both"), ("boss", "both"), file=path, defaults=KeyLimits(max_concurrent=3))
    ring.set_token("token")
    found = {key: ring.find(key.encode()) for key in ("first", "both", "boss", "key of alice", "token")}
    assert {key: principal and sorted(principal.scopes) for key, principal in found.items()} == {
        "first": ["inference"],
        "both": ["admin", "inference"],
        "boss": ["admin"],
        "key of alice": ["train"],
        "token": ["admin", "inference", "train"],
    }
    for key, principal in found.items():
        assert principal is not None
        # What scheduler.fair_weights names: the first digits of the key's SHA-256.
        assert principal.label == digest_of(key.encode())[:12]
    assert found["first"] is not None
    assert found["first"].limits == KeyLimits(max_concurrent=3)
    for wrong in (b"", b"firs", b"first ", b"FIRST", digest_of(b"first").encode(), b"\xff"):
        assert ring.find(wrong) is None


def test_an_admin_key_may_everything_and_the_others_their_own() -> None:
    ring = KeyRing(("user",), ("boss",), file=None, defaults=KeyLimits())
    user, boss = ring.find(b"user"), ring.find(b"boss")
    assert user is not None
    assert boss is not None
    assert [boss.may(scope) for scope in ("inference", "train", "admin")] == [True, True, True]
    assert [user.may(scope) for scope in ("inference", "train", "admin")] == [True, False, False]


def test_a_file_that_is_not_there_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError):
        access_of(tmp_path / "none")


def test_an_empty_file_opens_nothing(tmp_path: Path) -> None:
    write(tmp_path / "keys.json")
    access = access_of(tmp_path / "keys.json")
    assert access.asks_for_keys
    assert not access.local_admin


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, "old")

    async def rotate() -> None:
        access = access_of(path)
        assert access.ring.find(key_of("old")) is not None
        write(path, "old", "new")
        await access.refresh()
        assert access.ring.find(key_of("new")) is not None
        assert access.ring.find(key_of("old")) is not None
        write(path, "new")
        await access.refresh()
        assert access.ring.find(key_of("old")) is None
        assert access.ring.find(key_of("new")) is not None

    asyncio.run(rotate())


@pytest.mark.parametrize("harm", ["gone", "broken", "empty", "unreadable"])
def test_a_broken_file_changes_nothing(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "keys.json"
    write(path, "alice")

    async def run() -> None:
        access = access_of(path)
        path.unlink()
        if harm == "broken":
            path.write_text('{"version": 1, "keys": [{')
        elif harm == "empty":
            path.touch()
        elif harm == "unreadable":
            path.mkdir()
        for _ in range(3):
            await access.refresh()
        assert access.ring.find(key_of("alice")) is not None
        if harm == "unreadable":
            path.rmdir()
        write_again()
        await access.refresh()
        assert access.ring.find(key_of("alice")) is None
        assert access.ring.find(key_of("bob")) is not None

    def write_again() -> None:
        path.unlink(missing_ok=True)
        write(path, "bob")

    with capture_logs() as logs:
        asyncio.run(run())
    assert [log["event"] for log in logs].count("keys_not_reloaded") == 1  # once, not every two seconds


def test_the_file_is_watched_and_a_signal_has_it_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    write(path, "old")

    async def until(access: Access, name: str) -> None:
        for _ in range(1000):
            if access.ring.find(key_of(name)) is not None:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{name} was never found")

    async def run() -> None:
        access = access_of(path)
        async with access.watching():
            await asyncio.sleep(0)
            monkeypatch.setattr("runtime.access.access.WATCH_SECONDS", 0.02)
            access.reread()
            write(path, "second")
            await until(access, "second")
            monkeypatch.setattr("runtime.access.access.WATCH_SECONDS", 3600.0)
            await asyncio.sleep(0.1)
            write(path, "third")
            access.reread()
            await until(access, "third")

    asyncio.run(run())


def test_a_change_of_the_same_length_and_time_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, "aaa")
    before = path.stat()

    async def run() -> None:
        access = access_of(path)
        write(path, "bbb")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        await access.refresh()
        assert access.ring.find(key_of("bbb")) is not None

    asyncio.run(run())
