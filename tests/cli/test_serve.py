"""The snippets that `eft serve` prints are ones that work."""

import ast
import json
import shlex
from pathlib import Path

import httpx
import msgspec
import pytest

from runtime.cli.serve import banner, greeting
from tests.api.conftest import RunningServer, tiny_settings

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
def test_the_greeting_has_the_name_of_the_model_and_never_a_key(tiny_model: Path, tmp_path: Path, door: str) -> None:
    keys = tmp_path / "keys.json"
    server = {"none": {}, "keys_file": {"keys_file": str(keys)}}.get(door, {door: ("secret",)})
    text = greeting("http://127.0.0.1:8123", AWKWARD, tiny_settings(tiny_model, **server))
    assert text.startswith(f"Serving {AWKWARD} at http://127.0.0.1:8123 ")
    assert json.loads(parts(text)[0][-1])["model"] == AWKWARD
    assert ("EFT_API_KEY" in text) == (door in ("keys_file", "api_key"))
    assert "secret" not in text


def test_a_server_is_ready_with_its_url_and_the_name_in_requests(tiny_model: Path) -> None:
    settings = tiny_settings(tiny_model)
    settings = msgspec.structs.replace(
        settings, model=msgspec.structs.replace(settings.model, served_model_name="words")
    )
    with RunningServer(settings) as running:
        assert running.model == "words"
        assert httpx.get(f"{running.url}/ready", trust_env=False).status_code == 200
