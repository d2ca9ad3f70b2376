"""`eft chat`, against a server that echoes."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli.chat import DEFAULT_MAX_TOKENS, history_file
from runtime.trainer.data.instructions import ALPACA
from tests.cli.conftest import Eft
from tests.cli.fake_api import MODEL, FakeApi
from tests.tree import ROOT


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


def adapter(api: FakeApi, name: str, prompt: dict[str, object] | None, format: str = "chat", number: int = 2) -> None:
    """Let the server have an adapter, as the real one describes it."""
    model = {"id": name, "parent": MODEL, "prompt_format": format, "max_model_len": 300}
    versions = [{"number": 1, "prompt": None}, {"number": number, "prompt": prompt}]
    api.known |= {f"/v1/models/{name}": model, f"/v1/models/{name}@1": model}
    api.known[f"/admin/adapters/{name}"] = {"name": name, "current": number, "versions": versions}


def test_an_adapter_is_asked_with_the_system_message_of_its_rows(eft: Eft, api: FakeApi, url: str, say) -> None:
    adapter(api, "pirate", {"format": "chat", "system": "You are Captain Newt."})
    say("one\n/system -\n/reset\ntwo\n")
    done = eft("chat", "pirate", "--url", url)
    assert (done.code, done.out) == (0, "one \ntwo \n")
    assert "the system message is that of the training rows, 'You are Captain Newt.'" in done.err
    assert [message["content"] for message in api.bodies[0]["messages"]] == ["You are Captain Newt.", "one"]
    assert [message["content"] for message in api.bodies[1]["messages"]] == ["two"]
    for given, first in (("Be brief.", "Be brief."), ("", "three")):
        say("three\n")
        assert eft("chat", "pirate", "--url", url, "--system", given).err == ""
        assert api.bodies[-1]["messages"][0]["content"] == first
    say("four\n")
    assert eft("chat", "pirate@1", "--url", url).err == ""
    assert [message["content"] for message in api.bodies[-1]["messages"]] == ["four"]


@pytest.mark.parametrize("known", [True, False])
def test_an_adapter_of_alpacas_rows_is_asked_in_alpacas_prompt(
    eft: Eft, api: FakeApi, url: str, say, known: bool
) -> None:
    """Whether an admin may look or not: the format is no secret. Each question by itself."""
    prompt = {"format": "alpaca", "template": ALPACA.without} if known else None
    adapter(api, "triage", prompt, format="alpaca")
    say("Sort {this}.\nAnd that.\n/system Be brief.\n")
    done = eft("chat", "triage", "--url", url, "--temperature", "0")
    assert done.code == 1
    assert "alpaca's prompt, as it was trained" in done.err
    assert "which have no system message" in done.err
    assert [body["prompt"] for body in api.bodies] == [
        ALPACA.without.replace("{instruction}", text) for text in ("Sort {this}.", "And that.")
    ]
    assert {path for path in api.paths if "completions" in path} == {"/v1/completions"}
    assert api.bodies[0]["max_tokens"] == 150  # half of the context, where the server would take 16
    assert done.out.splitlines()[-1].endswith("Response: ")
    assert eft("chat", "triage", "--url", url, "--system", "Be brief.").code == 2


def test_an_adapter_of_texts_is_asked_in_texts(eft: Eft, api: FakeApi, url: str, say) -> None:
    adapter(api, "story", None, format="text")
    say("Once upon\n")
    done = eft("chat", "story", "--url", url, "--max-tokens", "9")
    assert (done.code, done.out) == (0, "Once upon \n")
    assert (api.bodies[0]["prompt"], api.bodies[0]["max_tokens"]) == ("Once upon", 9)


def test_a_name_that_the_running_server_knows_needs_no_url(
    eft: Eft, api: FakeApi, url: str, say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runtime.cli.chat.DEFAULT_URL", url)
    adapter(api, "pirate", {"format": "chat"})
    say("one\n")
    assert eft("chat", "pirate").out == "one \n"
    assert api.bodies[-1]["model"] == "pirate"
    say("two\n")
    done = eft("chat", "no-such-model")  # such as an adapter whose job is not done
    assert done.code == 1
    assert f"{url} has no model or adapter 'no-such-model' (yet)" in done.err
    for name in ("org/no-such-model", "no-such-model.gguf"):
        (tmp_path / "no-such-model.gguf").touch()
        done = eft("chat", name)  # to be loaded here, then
        assert (done.code, url in done.err) == (1, False)
    assert len(api.bodies) == 1


@pytest.mark.parametrize("name", ["pirate", "models/pirate"])
def test_a_name_of_the_server_is_meant_where_a_folder_here_has_it_too(
    eft: Eft, api: FakeApi, url: str, say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """As after `eft adapters download pirate`. A path is a path all the same."""
    monkeypatch.setattr("runtime.cli.chat.DEFAULT_URL", url)
    adapter(api, name, {"format": "chat"})
    (tmp_path / name).mkdir(parents=True)
    say("one\n")
    done = eft("chat", name)
    assert (done.code, done.out) == (0, "one \n")
    assert f"./{name} is the one here" in done.err
    for path in (f"./{name}", tmp_path / name):
        done = eft("chat", path)
        assert done.code == 1
        assert "is not a model directory" in done.err
    assert len(api.bodies) == 1


def test_an_answer_has_a_limit_and_a_cut_is_said(eft: Eft, api: FakeApi, url: str, say) -> None:
    """A model that repeats itself would fill the context."""
    say(f"{'ha ' * 2000}\nno\n")
    done = eft("chat", "--url", url)
    first, second = done.out.splitlines()
    assert (done.code, first.split(), second) == (0, ["ha"] * DEFAULT_MAX_TOKENS, "no ")
    assert (
        done.err == f"eft: the answer was cut after {DEFAULT_MAX_TOKENS} tokens; --max-tokens sets how long it may be\n"
    )
    assert [body["max_tokens"] for body in api.bodies] == [DEFAULT_MAX_TOKENS] * 2


def test_where_there_is_less_room_the_server_s_own_limit_holds(eft: Eft, api: FakeApi, url: str, say) -> None:
    say("long one\n")
    done = eft("chat", "--url", url)
    assert (done.code, done.out, done.err) == (0, "long one \n", "")
    assert [body.get("max_tokens") for body in api.bodies] == [DEFAULT_MAX_TOKENS, None]
    say("long two\n")
    asked = eft("chat", "--url", url, "--max-tokens", 101)  # what was asked for is never changed
    assert (asked.code, "400: too long" in asked.err) == (1, True)
    assert len(api.bodies) == 3


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


def test_another_model_goes_on_with_the_conversation(eft: Eft, api: FakeApi, url: str, say) -> None:
    adapter(api, "newts", {"format": "chat"})
    say("one\n/model newts\ntwo\n/model nets\n")
    done = eft("chat", "--url", url)
    assert done.out == "one \ntwo \n"
    assert [body["model"] for body in api.bodies] == [MODEL, "newts"]
    assert [message["content"] for message in api.bodies[1]["messages"]] == ["one", "one ", "two"]
    assert "no model 'nets'" in done.err
    assert "/model lists them" in done.err


def test_two_models_answer_the_same_questions(eft: Eft, api: FakeApi, url: str, say) -> None:
    adapter(api, "newts", {"format": "chat"})
    say("one\n/compare newts\ntwo\n/reset\nthree\n/compare -\nfour\n")
    done = eft("chat", "--url", url)
    assert done.out.split("\n")[:5] == ["one ", "echo:", "two ", "newts:", "two "]
    assert [body["model"] for body in api.bodies] == [MODEL, MODEL, "newts", MODEL, "newts", MODEL]
    assert [len(body["messages"]) for body in api.bodies] == [1, 3, 3, 1, 1, 3]


def test_the_history_is_private_and_can_be_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert history_file() is None
    monkeypatch.delenv("EFT_CHAT_HISTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "eft-chat" / "history"
    assert history_file() == path
    script = "import readline; from runtime.cli.chat import _keep_history; _keep_history(readline); "
    script += "readline.add_history('What is an eft?')"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "What is an eft?" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
