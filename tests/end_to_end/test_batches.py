"""Batches and files under `kill -9`, and under failures at the places where a process could die."""

import random
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.state import batch_of, chat_line, ended, jsonl, lines_of, wait_for
from tests.end_to_end.process import ServerProcess

COUNT = 100
FLAGS: dict[str, Any] = {"batch_concurrency": 4, "num_blocks": 256, "threads": 1}


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def check(server: ServerProcess, batch_id: str) -> None:
    """Each line is answered once, and as a request is answered."""
    client = client_of(server)
    done = ended(client, batch_id)
    assert done.status == "completed"
    found = lines_of(client, done.output_file_id)
    assert sorted(line["custom_id"] for line in found) == sorted(f"line-{number}" for number in range(COUNT))
    assert (done.request_counts.completed, done.request_counts.failed) == (COUNT, 0)
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in found}
    for number in range(0, COUNT, 17):
        online = server.http.post("/v1/chat/completions", json=LINES[number]["body"]).json()
        assert texts[f"line-{number}"] == online["choices"][0]["message"]["content"]


LINES = [chat_line(number, max_tokens=16 + number % 48, ignore_eos=True) for number in range(COUNT)]


@pytest.mark.timeout(900)
def test_kills_lose_no_line_and_repeat_none(tiny_model: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    with ServerProcess(str(tiny_model), tmp_path, **FLAGS) as server:
        batch_id = batch_of(client_of(server), jsonl(*LINES)).id
        server.kill()  # perhaps before it was checked
    seen = 0
    for _ in range(2):
        with ServerProcess(str(tiny_model), tmp_path, **FLAGS) as server:
            client, least = client_of(server), seen + rng.randint(1, 30)
            batch = wait_for(
                lambda client=client: client.batches.retrieve(batch_id),
                lambda now, least=least: now.request_counts.completed >= least or now.status == "completed",
            )
            server.kill()
        assert batch.request_counts.completed >= seen
        seen = batch.request_counts.completed
    with ServerProcess(str(tiny_model), tmp_path, **FLAGS) as server:
        check(server, batch_id)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "failpoints",
    ["batches.before_sync=exit:5", "batches.before_answer=exit:40", "batches.before_end=exit:1"],
)
def test_deaths_at_the_worst_places(tiny_model: Path, tmp_path: Path, failpoints: str) -> None:
    with ServerProcess(str(tiny_model), tmp_path, failpoints=failpoints, **FLAGS) as server:
        batch_id = batch_of(client_of(server), jsonl(*LINES)).id
        assert server.wait_for_exit() != 0
    with ServerProcess(str(tiny_model), tmp_path, **FLAGS) as server:
        check(server, batch_id)
        assert {file.purpose for file in client_of(server).files.list()} == {"batch", "batch_output"}


@pytest.mark.timeout(600)
def test_an_upload_on_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    """A 503 that says so; what was there stays, and so does the server."""
    with ServerProcess(str(tiny_model), tmp_path, file_size=3 * 1024**2, **FLAGS) as server:
        client = client_of(server)
        before = client.files.create(file=("a.jsonl", b"x" * 1024), purpose="batch")
        with pytest.raises(openai.InternalServerError) as full:
            client.files.create(file=("b.jsonl", b"x" * 4 * 1024**2), purpose="batch")
        assert full.value.status_code == 503
        assert str(tmp_path) not in full.value.message
        assert [path.name for path in (tmp_path / "files").iterdir()] == [before.id]
        assert client.files.content(before.id).content == b"x" * 1024
        after = client.files.create(file=("c.jsonl", b"y" * 1024), purpose="batch")
        assert [file.id for file in client.files.list()] == [after.id, before.id]


@pytest.mark.timeout(600)
def test_a_death_before_the_row_of_an_upload(tiny_model: Path, tmp_path: Path) -> None:
    with ServerProcess(str(tiny_model), tmp_path, failpoints="files.before_row=exit:2", **FLAGS) as server:
        client = client_of(server)
        kept = client.files.create(file=("a.jsonl", b"kept"), purpose="batch")
        with pytest.raises(openai.APIConnectionError):
            client.files.create(file=("b.jsonl", b"lost"), purpose="batch")
    with ServerProcess(str(tiny_model), tmp_path, **FLAGS) as server:
        assert [file.id for file in client_of(server).files.list()] == [kept.id]
        assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
        [aside] = (tmp_path / "lost+found").rglob("file-*")
        assert (aside / "content").read_bytes() == b"lost"
