"""`eft bench`."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Eft
from tests.cli.fake_api import FakeApi


def test_bench_serve_reports_what_the_server_did(eft: Eft, api: FakeApi, url: str) -> None:
    done = eft("bench", "serve", "--url", url, "--requests", 6, "--concurrency", 3, "--input-len", 20, "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert (report["completed"], report["failed"], report["model"]) == (6, 0, "echo")
    assert (report["spec"]["concurrency"], report["spec"]["output_len"]) == (3, 128)
    streamed = [body for body in api.bodies if body.get("stream")]
    assert [len(body["messages"][0]["content"].split()) for body in streamed] == [20] * 6
    assert api.most_at_once <= 3


def test_bench_serve_prints_a_table(eft: Eft, url: str) -> None:
    done = eft("bench", "serve", "--url", url, "--requests", 2, "--endpoint", "completions")
    assert done.code == 0
    assert "time to first token" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--requests", "0"], 2, "requests must be at least 1, got 0"),
        (["--rate", "2", "--concurrency", "3"], 2, "not both"),
        (["--url", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1"),
    ],
)
def test_bench_serve_errors(eft: Eft, arguments: list[str], code: int, message: str) -> None:
    done = eft("bench", "serve", *arguments)
    assert done.code == code
    assert message in done.err


def test_bench_offline_runs_the_engine(eft: Eft, tiny_model: Path) -> None:
    command = ["bench", "offline", tiny_model, "--requests", 5, "--concurrency", 2, "--input-len", 40]
    done = eft(*command, "--output-len", 6, "--shared-prefix", 32, "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert (report["model"], report["output_tokens"]) == (tiny_model.name, 30)
    assert report["prompt_tokens"] == 5 * 72
    assert report["cached_tokens"] > 0
    assert report["output_tokens_per_s"] == pytest.approx(30 / report["duration"])


def test_bench_offline_prints_a_table_and_names_what_cannot_fit(eft: Eft, tiny_model: Path) -> None:
    command = ["bench", "offline", tiny_model, "--requests", 2, "--output-len", 3]
    assert "tok/s" in eft(*command, "--input-len", 8).out
    too_long = eft(*command, "--input-len", 5000)
    assert too_long.code == 1
    assert "5000" in too_long.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "requests must be at least 1, got 0"),
        (["--concurrency", "0"], "scheduler.max_running (flag --max-running): expected a whole number"),
    ],
)
def test_bench_offline_usage(eft: Eft, arguments: list[str], message: str) -> None:
    done = eft("bench", "offline", "demo", *arguments)
    assert done.code == 2
    assert message in done.err


def test_a_model_that_is_none_is_an_error_without_a_traceback(eft: Eft, tmp_path: Path) -> None:
    done = eft("bench", "offline", tmp_path / "nothing")
    assert done.code == 1
    assert "is not a model" in done.err
    assert "Traceback" not in done.err
