"""The snippets that `eft serve` prints are ones that work."""

import ast
import asyncio
import json
import shlex
from pathlib import Path

import msgspec
import pytest

from runtime.cli.serve import _greet, banner
from settings.schema import TrainerSettings
from tests.api.conftest import RunningServer, tiny_settings
from tests.cli.conftest import Eft

AWKWARD = 'it\'s "odd"'


def parts(text: str) -> tuple[list[str], str]:
    """The curl command's arguments, and the Python program."""
    curl, _, python = text.partition("or, after `pip install openai`:")
    return shlex.split(curl[curl.index("curl ") :].replace("\\\n", " ")), python


def test_the_snippets_name_the_model_and_the_address() -> None:
    arguments, python = parts(banner("http://127.0.0.1:8123", AWKWARD, needs_key=False))
    assert arguments[1] == "http://127.0.0.1:8123/v1/chat/completions"
    assert json.loads(arguments[-1])["model"] == AWKWARD
    tree = ast.parse(python)
    values = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {AWKWARD, "http://127.0.0.1:8123/v1", "none"} <= values


def test_with_a_key_they_read_it_from_the_environment() -> None:
    text = banner("http://[::1]:8000", "m", needs_key=True)
    arguments, python = parts(text)
    assert "Authorization: Bearer $EFT_API_KEY" in arguments
    assert 'api_key=os.environ["EFT_API_KEY"]' in python
    assert "http://[::1]:8000/v1" in python
    ast.parse(python)


@pytest.mark.parametrize("door", ["none", "keys_file", "api_key", "admin_key"])
def test_the_model_has_its_name_whatever_key_is_asked_for(
    eft: Eft, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str
) -> None:
    """Also where only the token opens it, in a state directory that a flag of this server alone names."""
    keys = tmp_path / "keys.json"
    assert eft("keys", "new", "alice", "--file", keys).code == 0
    server = {"none": {}, "keys_file": {"keys_file": str(keys)}}.get(door, {door: ("secret",)})
    settings = msgspec.structs.replace(
        tiny_settings(tiny_model, **server), trainer=TrainerSettings(state_dir=str(tmp_path / "state"))
    )
    with RunningServer(settings) as running:
        capsys.readouterr()
        asyncio.run(_greet(running.url, settings))
    text = capsys.readouterr().out
    assert text.startswith(f"Serving {tiny_model.name} at {running.url} ")
    assert json.loads(parts(text)[0][-1])["model"] == tiny_model.name
    assert "secret" not in text
