"""`eft bench`."""

import json

import pytest

from tests.cli.conftest import Eft
from tests.cli.fake_api import FakeApi


def test_bench_serve_reports_what_the_server_did(eft: Eft, api: FakeApi, url: str) -> None:
    done = eft(
        "bench", "serve", "--url", url, "--requests", 6, "--concurrency", 3, "--input-len", 20, "--json"
    )
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
