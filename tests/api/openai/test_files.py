"""/v1/files by the unmodified `openai` client over a real server, and by raw HTTP where that client cannot go wrong."""

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.access.keys import StoredKey, change_keys, digest_of
from settings.api import FileSettings
from tests.api.conftest import RunningServer
from tests.api.state import batch_of, chat_line, ended, jsonl, lines_of, stateful_settings, wait_for

LIMIT = 256 * 1024
TOTAL = 600 * 1024


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(tiny_model: Path, state: Path) -> Iterator[RunningServer]:
    files = FileSettings(max_file=LIMIT, max_files_total=TOTAL)
    with RunningServer(stateful_settings(tiny_model, state, files=files)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)


def on_disk(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "files").iterdir())


def test_a_file_from_upload_to_deletion(client: openai.OpenAI, state: Path) -> None:
    content = bytes(range(256)) * 700
    file = client.files.create(file=("über data.jsonl", content), purpose="fine-tune")
    assert (file.object, file.bytes, file.purpose, file.status) == ("file", len(content), "fine-tune", "processed")
    assert file.filename == "über data.jsonl"
    assert file.expires_at is None
    assert client.files.retrieve(file.id) == file
    found = client.files.content(file.id)
    assert hashlib.sha256(found.content).digest() == hashlib.sha256(content).digest()
    assert found.response.headers["content-type"] == "application/octet-stream"
    assert on_disk(state) == [file.id]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    assert on_disk(state) == []
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(file.id)
        assert missing.value.code == "file_not_found"


def test_lists_are_pages(client: openai.OpenAI) -> None:
    made = [
        client.files.create(file=(f"{number}.jsonl", b"{}"), purpose="batch" if number % 2 else "fine-tune").id
        for number in range(7)
    ]
    assert [file.id for file in client.files.list(limit=3)] == made[::-1]  # the client asks for page after page
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert [file.id for file in client.files.list(purpose="batch", order="asc")] == made[1::2]
    page = client.files.list(limit=3)
    assert (page.has_more, len(page.data)) == (True, 3)
    assert [file.id for file in client.files.list(after=made[2], limit=5).data] == made[1::-1]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.files.list(after="file-nothing")
    assert unknown.value.param == "after"


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("purpose=sharing", "purpose"), ("a=b", "a")],
)
def test_parameters_of_the_list(server: RunningServer, query: str, param: str) -> None:
    answer = httpx.get(f"{server.url}/v1/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_expiry(client: openai.OpenAI) -> None:
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after=expires)
    assert file.expires_at == file.created_at + 3600
    for wrong, param in (
        ({"anchor": "created_at", "seconds": 60}, "expires_after.seconds"),
        ({"anchor": "last_active_at", "seconds": 3600}, "expires_after.anchor"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after=wrong)  # type: ignore[arg-type]
        assert refused.value.param == param


def test_every_purpose_of_openai_and_no_other(client: openai.OpenAI) -> None:
    for purpose in ("fine-tune", "batch", "user_data", "evals", "assistants", "vision"):
        assert client.files.create(file=b"text", purpose=purpose).purpose == purpose  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=b"text", purpose="sharing")  # type: ignore[arg-type]
    assert refused.value.param == "purpose"
    assert "user_data" in refused.value.message


def form(*parts: tuple[str, str | None, bytes], boundary: str = "xyz") -> tuple[bytes, dict[str, str]]:
    """A form's body and its headers, from (name, filename, content)."""
    body = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


PURPOSE = ("purpose", None, b"batch")
FILE = ("file", "a.jsonl", b"{}")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ((FILE,), "purpose"),
        ((PURPOSE,), "file"),
        ((PURPOSE, FILE, FILE), "file"),
        ((PURPOSE, PURPOSE, FILE), "purpose"),
        ((PURPOSE, ("file", "a.jsonl", b"")), "file"),
        ((PURPOSE, ("data", "a.jsonl", b"{}")), "data"),
        ((PURPOSE, FILE, ("colour", None, b"blue")), "colour"),
        ((("purpose", None, b"\xff"), FILE), "purpose"),
        ((("purpose", None, b"x" * 20_000), FILE), "purpose"),
        ((PURPOSE, ("file", "n" * 300, b"{}")), "file"),
        ((PURPOSE, FILE, ("expires_after[seconds]", None, b"3600")), "expires_after.anchor"),
    ],
)
def test_forms_that_are_refused(server: RunningServer, state: Path, parts: Any, param: str) -> None:
    content, headers = form(*parts)
    answer = httpx.post(f"{server.url}/v1/files", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert on_disk(state) == []


def test_bodies_that_are_no_form(server: RunningServer, state: Path) -> None:
    url = f"{server.url}/v1/files"
    assert httpx.post(url, json={"purpose": "batch"}).status_code == 415
    content, headers = form(PURPOSE, FILE)
    assert httpx.post(url, content=content, headers={"content-type": "multipart/form-data"}).status_code == 400
    assert httpx.post(url, content=content[:-9], headers=headers).status_code == 400
    assert httpx.post(url, content=b"", headers=headers).status_code == 400
    assert httpx.post(url, content=content, headers={**headers, "content-encoding": "gzip"}).status_code == 415
    assert on_disk(state) == []


def test_a_path_in_the_name_is_dropped(server: RunningServer, client: openai.OpenAI) -> None:
    content, headers = form(PURPOSE, ("file", "../../etc/passwd", b"{}"))
    assert httpx.post(f"{server.url}/v1/files", content=content, headers=headers).json()["filename"] == "passwd"
    assert [file.filename for file in client.files.list()] == ["passwd"]


def test_an_upload_that_breaks_off_leaves_nothing(server: RunningServer, state: Path) -> None:
    content, headers = form(PURPOSE, ("file", "a.jsonl", b"x" * 200_000))
    with socket.create_connection(server.address) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {headers['content-type']}\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:150_000])
        wait_for(lambda: on_disk(state), bool)
    wait_for(lambda: on_disk(state), lambda names: names == [])
    assert httpx.get(f"{server.url}/v1/files").json()["data"] == []


def test_quotas(server: RunningServer, client: openai.OpenAI, state: Path) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=("a.jsonl", b"x" * (LIMIT + 1)), purpose="batch")
    assert large.value.status_code == 413
    assert str(LIMIT) in large.value.message
    first = client.files.create(file=("a.jsonl", b"x" * LIMIT), purpose="batch")
    client.files.create(file=("a.jsonl", b"x" * LIMIT), purpose="batch")
    with pytest.raises(openai.APIStatusError) as full:
        client.files.create(file=("a.jsonl", b"x" * (TOTAL - 2 * LIMIT + 1)), purpose="batch")
    assert (full.value.status_code, full.value.code) == (413, "file_quota_exceeded")
    assert len(on_disk(state)) == 2
    client.files.delete(first.id)
    client.files.create(file=("a.jsonl", b"x" * LIMIT), purpose="batch")


def test_the_input_of_a_batch_stays(client: openai.OpenAI) -> None:
    batch = batch_of(client, jsonl(*(chat_line(number, max_tokens=200) for number in range(40))))
    with pytest.raises(openai.ConflictError) as used:
        client.files.delete(batch.input_file_id)
    assert used.value.code == "file_in_use"
    client.batches.cancel(batch.id)
    assert ended(client, batch.id).status == "cancelled"
    assert client.files.delete(batch.input_file_id).deleted


def test_files_belong_to_keys(tiny_model: Path, tmp_path: Path) -> None:
    """Another key sees neither files nor batches; an admin key sees all, and what it sees it may delete."""
    keys = [
        StoredKey(name=name, scopes=(scope,), sha256=digest_of(name.encode()), created="2026")
        for name, scope in (("ann", "inference"), ("bob", "inference"), ("root", "admin"))
    ]
    change_keys(tmp_path / "keys.json", lambda _: keys)  # type: ignore[arg-type, return-value]
    settings = stateful_settings(tiny_model, tmp_path / "state", keys_file=str(tmp_path / "keys.json"))
    with RunningServer(settings) as server:
        ann, bob, root = (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=name, max_retries=0) for name in ("ann", "bob", "root")
        )
        batch = batch_of(ann, jsonl(chat_line(1), chat_line(2)))
        done = ended(ann, batch.id)
        assert [line["custom_id"] for line in lines_of(ann, done.output_file_id)] == ["line-1", "line-2"]
        assert list(bob.files.list()) == []
        assert list(bob.batches.list()) == []
        for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(done.output_file_id)
        for other in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                other(batch.id)
        with pytest.raises(openai.NotFoundError) as input_of_another:
            bob.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        assert input_of_another.value.param == "input_file_id"
        assert {file.id for file in root.files.list()} == {batch.input_file_id, done.output_file_id}
        assert root.files.delete(done.output_file_id).deleted
        assert [file.id for file in ann.files.list()] == [batch.input_file_id]
