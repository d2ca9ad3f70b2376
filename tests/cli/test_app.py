"""The application: help, version, exit codes, and what a start-up must not import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli import app as cli
from runtime.support.version import version
from settings import fields, values
from tests.cli.conftest import Eft

ROOT = Path(__file__).parents[2]


def process(*arguments: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "runtime"]
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_a_shell_knows_commands_and_flags(eft: Eft, shell: str) -> None:
    done = eft("completion", shell)
    assert done.code == 0
    for known in ("serve", "adapters", "max-running"):
        assert known in done.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.out, text=True, check=True)


def test_help_lists_every_command(eft: Eft) -> None:
    done = eft("--help")
    assert done.code == 0
    for name in ("serve", "chat", "batch", "train", "jobs", "bench", "config", "doctor"):
        assert name in done.out


def test_version(eft: Eft) -> None:
    assert eft("--version").out.strip() == version()


@pytest.mark.parametrize(
    "command", [["serve"], ["chat"], ["batch"], ["train"], ["bench", "offline"], ["config", "show"]]
)
def test_help_of_what_loads_a_model_has_a_flag_with_its_documentation_for_every_setting(
    eft: Eft, command: list[str]
) -> None:
    done = eft(*command, "--help")
    assert done.code == 0
    text = " ".join(done.out.replace("│", " ").split())
    everything = command in (["serve"], ["config", "show"])
    for field in fields.fields():
        if not everything and field.section in ("server", "adapters", "trainer", "files", "responses", "feedback"):
            continue
        if not everything and field.section in ("adapters", "trainer") and command != ["train"]:
            continue
        if field.name == "model" and command != ["config", "show"]:
            continue  # has a line of its own in each command
        assert field.flag in text, field.key
        assert " ".join(field.doc.replace("`", "").split()[:4]) in text, field.key
        if field.default is not None and values.show(field, field.default):
            assert f"[default: {values.show(field, field.default)}]" in text, field.key


def test_starting_up_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from runtime.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'litestar', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    for arguments in (["--help"], ["serve", "--help"], ["config", "show"], ["no-such-command"]):
        done = process(*arguments, cwd=tmp_path, code=code)
        assert done.stderr.splitlines()[-1] == "[]", arguments


def test_as_a_process_the_exit_code_and_the_streams_are_apart(tmp_path: Path) -> None:
    done = process("config", "show", "--port", "70000", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("eft: server.port (flag --port): expected a whole number from 0 to 65535, got 70000\n")


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m runtime config docs | head -n 1",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "# Settings\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], 'Unknown command "serv". Did you mean "serve"?'),
        (["serve", "--max-runing", "3"], "Unknown option: --max-runing. Did you mean --max-running?"),
        (
            ["serve", "--policy", "lifo"],
            'Invalid value "lifo" for --policy. Choose from: "fcfs", "priority", "deadline", "fair".',
        ),
        (["serve", "--port"], "--port requires an argument"),
        (["batch", "in.jsonl"], "requires an argument"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_suggestion(eft: Eft, arguments: list[str], message: str) -> None:
    done = eft(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_unexpected_errors_show_no_traceback_unless_asked(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object = None) -> None:
        raise LookupError("what went wrong")

    monkeypatch.setattr("runtime.cli.config.render.example_toml", broken)
    done = eft("config", "example")
    assert (done.code, done.err) == (1, "eft: LookupError: what went wrong\n")
    monkeypatch.setenv("EFT_DEBUG", "1")
    assert "Traceback" in eft("config", "example").err


def test_ctrl_c_is_exit_code_130(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.cli.config.render.example_toml", interrupted)
    assert eft("config", "example").code == cli.INTERRUPTED
