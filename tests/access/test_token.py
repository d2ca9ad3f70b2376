"""The admin token's file."""

import os
import stat
from pathlib import Path

import pytest

from runtime.access.access import FILE, make_token, read_token, remove_token, write_token


def test_it_is_private_and_for_one_port(tmp_path: Path) -> None:
    token = make_token(8000)
    old = os.umask(0)
    try:
        path = write_token(tmp_path, token)
    finally:
        os.umask(old)
    assert path == tmp_path / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(tmp_path, 8000) == token
    assert read_token(tmp_path, 800) is None
    assert read_token(tmp_path, 80000) is None
    assert len({make_token(8000) for _ in range(50)}) == 50


def test_each_start_has_its_own(tmp_path: Path) -> None:
    first, second = make_token(8000), make_token(8000)
    write_token(tmp_path, first)
    path = write_token(tmp_path, second)
    remove_token(path, first)  # the end of the one before takes nothing from the one after
    assert read_token(tmp_path, 8000) == second
    remove_token(path, second)
    assert not path.exists()
    remove_token(path, second)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"something else", b"eft-admin-", b"x" * 5000])
def test_what_is_no_token(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read_token(tmp_path, 8000) is None


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text(make_token(8000))
    (tmp_path / FILE).symlink_to("other")
    assert read_token(tmp_path, 8000) is None
