"""`eft batch`, against a server that echoes."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from runtime.cli import batch as batch_run
from tests.cli.batch_files import chat, results, write
from tests.cli.conftest import Eft
from tests.cli.fake_api import FakeApi


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "LONGEST_WAIT", 0.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_every_request_gets_a_line_in_openai_form(eft: Eft, loaded_here: FakeApi, source: Path, output: Path) -> None:
    completion = {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x y z"}}
    write(source, chat("a", "one two", model="other", max_tokens=3), completion, "\n")
    done = eft("batch", source, output, "--model", "demo", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    del report["seconds"]
    assert report == {
        "ok": 2,
        "failed": 0,
        "prompt_tokens": 5,
        "output_tokens": 5,
        "skipped": 0,
        "failed_before": 0,
    }
    found = results(output)
    assert found["a"]["response"]["status_code"] == 200
    assert found["a"]["response"]["request_id"] == "req-1"
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == "one two"
    assert found["a"]["error"] is None
    assert found["a"]["id"].startswith("batch_req_")
    assert {body["model"] for body in loaded_here.bodies} == {"other", "echo"}
    assert sorted(loaded_here.paths) == ["/v1/chat/completions", "/v1/completions", "/v1/models"]


def test_bad_lines_and_failures_are_results_too(eft: Eft, loaded_here: FakeApi, source: Path, output: Path) -> None:
    write(
        source,
        chat("good", "hi"),
        "{not json\n",
        {**chat("", "x")},
        {**chat("get", "x"), "method": "GET"},
        {**chat("where", "x"), "url": "/v1/embeddings"},
        {**chat("what", "x"), "body": []},
        {**chat("more", "x"), "extra": 1},
        chat("stream", "x", stream=True),
        chat("refused", "fail please"),
        "[]\n",
    )
    done = eft("batch", source, output)
    assert done.code == 1
    assert done.out.startswith("1 succeeded, 9 failed;")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    errors = {record["error"]["line"]: record["error"] for record in records if record["error"]}
    assert {line: error["message"].split(": ", 1)[1].split(":")[0] for line, error in errors.items()} == {
        2: "is no JSON",
        3: "custom_id must be a non-empty string, got ''",
        4: "method must be POST, got 'GET'",
        5: "url must be /v1/chat/completions or /v1/completions, got '/v1/embeddings'",
        6: "body must be an object",
        7: "has unknown keys",
        8: "stream is not possible in a batch",
        10: "is no JSON object",
    }
    assert results(output)["refused"]["response"]["status_code"] == 400
    assert len(loaded_here.bodies) == 2


def test_a_second_run_goes_on_where_the_first_stopped(
    eft: Eft, loaded_here: FakeApi, source: Path, output: Path
) -> None:
    write(source, *[chat(f"r{n}", f"text {n}") for n in range(4)], "{bad\n")
    assert eft("batch", source, output).code == 1
    lines = output.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["custom_id"] in ("r0", "r2", None)]
    output.write_text("".join(kept) + lines[-1][:20])  # a crash tore the last line
    loaded_here.bodies.clear()
    again = eft("batch", source, output)
    assert again.code == 1
    assert "2 succeeded, 0 failed; 3 done before (1 of them failed)" in again.out
    assert sorted(body["messages"][0]["content"] for body in loaded_here.bodies) == ["text 1", "text 3"]
    assert set(results(output)) == {"r0", "r1", "r2", "r3", None}
    assert len(output.read_text().splitlines()) == 5
    loaded_here.paths.clear()
    assert eft("batch", source, output).code == 1
    assert loaded_here.paths == []


def test_concurrency_is_what_was_asked_for(eft: Eft, loaded_here: FakeApi, source: Path, output: Path) -> None:
    loaded_here.pause = 0.01
    write(source, *[chat(f"r{n}", "x") for n in range(12)])
    assert eft("batch", source, output, "--concurrency", "3").code == 0
    assert loaded_here.most_at_once == 3


def test_a_busy_server_is_asked_again(eft: Eft, url: str, api: FakeApi, source: Path, output: Path) -> None:
    write(source, chat("a", "busy one"), chat("b", "busy two"))
    assert eft("batch", source, output, "--url", url).code == 0
    assert len(api.bodies) == 4


def test_a_server_that_is_gone_stops_the_run_and_burns_no_requests(
    eft: Eft, url: str, api: FakeApi, source: Path, output: Path
) -> None:
    write(source, chat("a", "fine"), chat("b", "gone"), chat("c", "never"))
    done = eft("batch", source, output, "--url", url, "--concurrency", "1")
    assert done.code == 1
    assert "the same command goes on from here" in done.err
    assert set(results(output)) == {"a"}


def test_a_request_that_takes_too_long_is_an_error_of_its_own(
    eft: Eft, loaded_here: FakeApi, source: Path, output: Path
) -> None:
    loaded_here.pause = 30
    write(source, chat("slow", "x"))
    assert eft("batch", source, output, "--timeout", "0.05").code == 1
    assert results(output)["slow"]["error"] == {"code": "timeout", "message": "no answer within 0.05 s"}


def test_ctrl_c_leaves_a_file_to_go_on_from(
    eft: Eft, loaded_here: FakeApi, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, *[chat(f"r{n}", f"text {n}") for n in range(6)])
    generate = loaded_here._generate

    async def interrupted(body: dict[str, Any], receive: Any, send: Any) -> None:
        if body["messages"][0]["content"] == "text 3":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        await generate(body, receive, send)

    monkeypatch.setattr(loaded_here, "_generate", interrupted)
    done = eft("batch", source, output, "--concurrency", "1")
    assert done.code == 130
    assert "the same command goes on from here" in done.err
    assert set(results(output)) == {"r0", "r1", "r2"}
    monkeypatch.setattr(loaded_here, "_generate", generate)
    assert eft("batch", source, output).code == 0
    assert len(results(output)) == 6


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (
            [chat("a", "x"), chat("b", "x"), chat("a", "y")],
            [],
            "custom_id 'a' of line 3 is also that of line 1",
        ),
        ([chat("a", "x")], ["--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        ([chat("a", "x")], ["--timeout", "nan"], "--timeout must be above 0 seconds, got nan"),
        ([chat("a", "x")], ["--api-key", "k"], "--api-key is for a server"),
        ([chat("a", "x")], ["--url", "localhost"], "is no URL of a server"),
        ([chat("a", "x")], ["--url", "http://127.0.0.1:1", "--model", "m"], "--model is for a model"),
    ],
)
def test_wrong_usage_starts_nothing(
    eft: Eft,
    loaded_here: FakeApi,
    source: Path,
    output: Path,
    lines: list[object],
    arguments: list[str],
    message: str,
) -> None:
    done = eft("batch", write(source, *lines), output, *arguments)
    assert done.code == 2
    assert message in done.err
    assert loaded_here.paths == []


def test_files_that_cannot_be_what_they_are_given_for(
    eft: Eft, loaded_here: FakeApi, source: Path, output: Path
) -> None:
    assert "cannot read" in eft("batch", source, output).err
    write(source, chat("a", "x"))
    assert "the output must not be the input" in eft("batch", source, source).err
    output.write_text("my diary\n")
    done = eft("batch", source, output)
    assert done.code == 2
    assert "line 1 is no result of a batch" in done.err
    assert output.read_text() == "my diary\n"
