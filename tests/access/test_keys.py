"""The keys file: what it holds, who changes it, and what is no keys file."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from runtime.access.keys import (
    KEY_PREFIX,
    KeyLimits,
    KeysFileError,
    OwnLimits,
    StoredKey,
    change_keys,
    digest_of,
    make_key,
    read_keys,
    write_private,
)


def stored(name: str, key: str = "", **more: object) -> StoredKey:
    digest = digest_of((key or name).encode())
    return StoredKey(name=name, scopes=("inference",), sha256=digest, created="2026-01-31T12:00:00Z", **more)  # type: ignore[arg-type]


def test_keys_have_256_random_bits_and_no_comma() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)
    assert not any("," in key for key in keys)  # a variable with two keys has one between them


def test_the_file_is_private_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = make_key()
    old = os.umask(0)
    try:
        change_keys(path, lambda keys: [*keys, stored("alice", key)])
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert key not in text
    assert key.removeprefix(KEY_PREFIX) not in text
    assert json.loads(text)["keys"][0]["name"] == "alice"
    assert [one.name for one in read_keys(path).keys] == ["alice"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change_keys(path, lambda keys: [stored("alice")])
    before = path.read_bytes()

    def fail(keys: tuple[StoredKey, ...]) -> list[StoredKey]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        change_keys(path, fail)
    with pytest.raises(ValueError, match="two keys have the name `alice`"):
        change_keys(path, lambda keys: [*keys, stored("alice", "another")])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b'{"version": 1, "keys": []}')
    link = tmp_path / "keys.json"
    link.symlink_to("real.json")
    change_keys(link, lambda keys: [stored("alice")])
    assert link.is_symlink()
    assert [key.name for key in read_keys(tmp_path / "real.json").keys] == ["alice"]


def test_changes_at_once_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add(number: int) -> None:
        change_keys(path, lambda keys: [*keys, stored(f"key-{number}")])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path).keys} == {f"key-{number}" for number in range(12)}


GOOD = {"name": "a", "scopes": ["admin"], "sha256": "0" * 64, "created": "2026"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"\xff", b'{"version": 2}', b'{"version": 1, "keys": {}}', b'{"kees": []}',
        *(
            json.dumps({"version": 1, "keys": keys}).encode()
            for keys in (
                [{**GOOD, "name": "../x"}], [{**GOOD, "name": ""}], [{**GOOD, "name": "x" * 65}],
                [{**GOOD, "scopes": []}], [{**GOOD, "scopes": ["root"]}], [{**GOOD, "sha256": "0" * 63}],
                [{**GOOD, "sha256": "G" * 64}], [{**GOOD, "key": "secret"}], [GOOD, GOOD],
                [GOOD, {**GOOD, "name": "b"}], [GOOD, {**GOOD, "sha256": "1" * 64}],
                [{**GOOD, "limits": {"requests_per_minute": 0}}], [{**GOOD, "limits": {"rpm": 1}}],
                [{**GOOD, "limits": {"max_queue_share": 1.5}}],
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_keys_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(KeysFileError, match=str(path)):
        read_keys(path)


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(KeysFileError, match="Is a directory"):
        read_keys(tmp_path)
    with pytest.raises(KeysFileError, match="No such file"):
        change_keys(tmp_path / "none" / "keys.json", lambda keys: keys)


def test_what_is_written_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_private(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"after")
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_own_limits_win_and_null_is_none() -> None:
    defaults = KeyLimits(requests_per_minute=10, tokens_per_minute=20)
    assert OwnLimits().over(defaults) == defaults
    assert OwnLimits(requests_per_minute=5).over(defaults) == KeyLimits(requests_per_minute=5, tokens_per_minute=20)
    assert OwnLimits(requests_per_minute=None).over(defaults) == KeyLimits(tokens_per_minute=20)
