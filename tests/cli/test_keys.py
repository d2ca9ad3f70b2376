"""`eft keys`, and which key the command line sends by itself."""

import json
import stat
from pathlib import Path

import pytest

from runtime.access.access import make_token, write_token
from runtime.access.keys import KEY_PREFIX, digest_of, read_keys
from runtime.cli.client import local_token
from tests.cli.conftest import Eft


def test_the_life_of_a_key(eft: Eft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("EFT_SERVER_KEYS_FILE", str(path))
    made = eft("keys", "new", "alice", "--scope", "train", "--scope", "inference", "--requests-per-minute", 60)
    assert made.code == 0, made.err
    key = made.out.strip()
    assert key.startswith(KEY_PREFIX)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (stored,) = read_keys(path).keys
    assert (stored.name, stored.scopes) == ("alice", ("inference", "train"))
    assert stored.sha256 == digest_of(key.encode())
    assert stored.limits.requests_per_minute == 60
    assert key not in path.read_text()

    assert eft("keys", "new", "bob").code == 0
    listed = eft("keys", "list").out
    assert key not in listed
    assert listed.splitlines()[1].split()[:3] == ["alice", "inference,", "train"]
    assert "requests_per_minute 60" in listed
    shown = json.loads(eft("keys", "list", "--json").out)
    assert [(one["name"], one["scopes"], one["limits"]) for one in shown] == [
        ("alice", ["inference", "train"], {"requests_per_minute": 60}),
        ("bob", ["inference"], {}),
    ]

    twice = eft("keys", "new", "alice")
    assert (twice.code, twice.out) == (1, "")
    assert "already" in twice.err
    assert eft("keys", "revoke", "alice").out == "Revoked alice.\n"
    assert [one.name for one in read_keys(path).keys] == ["bob"]
    missing = eft("keys", "revoke", "alice")
    assert missing.code == 1
    assert "it has: bob" in missing.err


def test_as_json(eft: Eft, tmp_path: Path) -> None:
    made = json.loads(eft("keys", "new", "ci", "--scope", "admin", "--file", tmp_path / "k.json", "--json").out)
    assert made["name"] == "ci"
    assert digest_of(made["key"].encode()) == read_keys(tmp_path / "k.json").keys[0].sha256


@pytest.mark.parametrize(
    "arguments",
    [
        ("new", "../x"), ("new", ""), ("new", "x" * 65), ("new", "a", "--scope", "root"),
        ("new", "a", "--requests-per-minute", "0"), ("new", "a", "--max-queue-share", "1.5"),
        ("new", "a", "--min-deadline", "0"), ("new", "a b"),
    ],
)  # fmt: skip
def test_what_is_no_key(eft: Eft, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = eft("keys", *arguments, "--file", tmp_path / "keys.json")
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "keys.json").exists()


def test_which_file(eft: Eft) -> None:
    done = eft("keys", "list")
    assert done.code == 2
    assert "server.keys_file" in done.err


def test_a_broken_file_is_left_alone(eft: Eft, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    for arguments in (("new", "a"), ("revoke", "a"), ("list",)):
        done = eft("keys", *arguments, "--file", path)
        assert done.code == 1
        assert "is no keys file" in done.err
    assert path.read_text() == "{"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8123", "http://localhost:8123/v1", "http://[::1]:8123"])
def test_a_local_servers_token_is_found(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_TRAINER_STATE_DIR", str(tmp_path))
    token = make_token(8123)
    write_token(tmp_path, token)
    assert local_token(url) == token


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8124",  # another's server may listen there
        "http://127.0.0.1",
        "http://models.example:8123",
        "http://127.0.0.2:8123",
        "http://localhost.example:8123",
        "http://127.0.0.1.example:8123",
        "nothing",
    ],
)
def test_a_token_goes_nowhere_else(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_TRAINER_STATE_DIR", str(tmp_path))
    write_token(tmp_path, make_token(8123))
    assert local_token(url) is None
