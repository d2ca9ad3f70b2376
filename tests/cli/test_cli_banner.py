"""The snippets that `eft serve` prints are ones that work."""

import ast
import json
import shlex

from runtime.cli.banner import banner

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
