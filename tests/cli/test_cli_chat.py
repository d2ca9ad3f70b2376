"""`eft chat`, against a server that echoes."""

import io
import json
import os
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Eft
from tests.cli.fake_api import FakeApi


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch):
    """Pipe this text into the command."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_piped_questions_give_plain_answers_and_one_conversation(eft: Eft, api: FakeApi, url: str, say) -> None:
    say("one two\nthree\n")
    done = eft("chat", "--url", url, "--system", "be brief", "--temperature", "0", "--max-tokens", "9")
    assert (done.code, done.out, done.err) == (0, "one two \nthree \n", "")
    first, second = api.bodies
    assert first["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
    ]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "one two "},
        {"role": "user", "content": "three"},
    ]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("echo", 0.0, 9)


def test_json_prints_one_object_an_answer(eft: Eft, url: str, say) -> None:
    say("a b\nc\n")
    done = eft("chat", "--url", url + "/v1", "--json")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert records[0] == {
        "question": "a b",
        "answer": {"text": "a b ", "finish_reason": "stop", "usage": {"completion_tokens": 2}},
        "model": "echo",
    }
    assert len(records) == 2


def test_a_backslash_continues_a_line_and_commands_work(eft: Eft, api: FakeApi, url: str, say, tmp_path) -> None:
    say("one\\\ntwo\n/system be kind\n/reset\nthree\n/save talk.json\n/etc/hosts is what?\n/exit\nnever\n")
    assert eft("chat", "--url", url).code == 0
    asked = [body["messages"][-1]["content"] for body in api.bodies]
    assert asked == ["one\ntwo", "three", "/etc/hosts is what?"]
    assert api.bodies[1]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "three"},
    ]
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][-1] == {"role": "assistant", "content": "three "}


def test_a_failed_question_is_reported_and_leaves_no_trace(eft: Eft, api: FakeApi, url: str, say) -> None:
    say("fail now\nfine\n/sav x\n")
    done = eft("chat", "--url", url)
    assert done.code == 1
    assert done.out == "fine \n"
    assert done.err.splitlines() == [
        "eft: no answer: 400: cannot do that",
        "eft: unknown command /sav; did you mean save?; /help lists them",
    ]
    assert [m["content"] for m in api.bodies[1]["messages"]] == ["fine"]


def test_ctrl_c_stops_the_answer_and_not_the_dialogue(
    eft: Eft, loaded_here: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one two three four five", "next"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def press(word: str) -> None:
        if word == "three":
            os.kill(os.getpid(), signal.SIGINT)

    loaded_here.on_word = press
    loaded_here.pause = 0.01
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    done = eft("chat", "demo")
    assert done.code == 0
    assert "one two \n(stopped)\n" in done.out
    assert done.out.rstrip().endswith("next")
    assert loaded_here.left == 1
    assert [m["content"] for m in loaded_here.bodies[1]["messages"]] == [
        "one two three four five",
        "one two ",
        "next",
    ]


def test_no_server_names_the_ways_out(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.cli.chat.DEFAULT_URL", "http://127.0.0.1:1")
    done = eft("chat")
    assert done.code == 1
    assert "no server answers at http://127.0.0.1:1" in done.err
    assert "eft chat demo" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "ftp://x"], "is no URL of a server"),
        (
            ["--url", "http://127.0.0.1:1", "--max-running", "3"],
            "--max-running is for a model that is loaded here",
        ),
        (["demo", "--api-key", "k"], "--api-key is for a server"),
        (["demo", "--max-running", "0"], "scheduler.max_running (flag --max-running)"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(eft: Eft, arguments: list[str], message: str) -> None:
    done = eft("chat", *arguments)
    assert done.code == 2
    assert message in done.err


def test_a_key_comes_from_flag_or_environment(eft: Eft, api: FakeApi, url: str, say, monkeypatch) -> None:
    api.key = "k"
    say("hi\n")
    refused = eft("chat", "--url", url)
    assert (refused.code, refused.out) == (1, "")
    assert "401: wrong key" in refused.err
    assert eft("chat", "--url", url, "--api-key", "k").out == "hi \n"
    say("hi\n")
    monkeypatch.setenv("EFT_API_KEY", "k")
    assert eft("chat", "--url", url).out == "hi \n"


def test_a_model_here_is_loaded_with_the_settings_given(eft: Eft, loaded_here: FakeApi, say, tmp_path: Path) -> None:
    say("hello there\n")
    assert eft("chat", "demo", "--kv-memory", "1GiB").out == "hello there \n"
    assert loaded_here.bodies[0]["stream"] is True
