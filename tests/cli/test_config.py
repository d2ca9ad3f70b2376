"""`eft config`."""

import json
from pathlib import Path

import pytest

from runtime.cli.app import _LAZY
from settings import fields, render
from tests.cli.conftest import Eft

ROOT = Path(__file__).parents[2]


def test_show_has_every_value_and_its_origin(eft: Eft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eft.toml").write_text("[server]\nport = 9\nmax_body = '1MiB'\n")
    monkeypatch.setenv("EFT_SERVER_PORT", "10")
    done = eft("config", "show", "--max-batched-tokens", "4K", "--no-prefix-caching")
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.out.splitlines()[1:]}
    assert done.code == 0
    assert len(rows) == len(fields.fields())
    assert rows["server.port"].split() == ["10", "environment", "EFT_SERVER_PORT"]
    assert rows["server.max_body"].split() == ["1MiB", "file", "eft.toml"]
    assert rows["scheduler.max_batched_tokens"].split() == ["4096", "flag", "--max-batched-tokens"]
    assert rows["cache.prefix_caching"].split() == ["false", "flag", "--prefix-caching"]
    assert rows["limits.max_n"].split() == ["64", "default"]


def test_show_as_json(eft: Eft, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("[cache]\nkv_memory = '4GiB'\n")
    shown = json.loads(eft("config", "show", "--json", "--config", path).out)
    assert shown["file"] == str(path)
    assert shown["settings"]["cache"]["kv_memory"] == {"value": 4 * 1024**3, "origin": f"file {path}"}
    assert shown["settings"]["server"]["port"] == {"value": 8000, "origin": "default"}


def test_keys_are_hidden(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_SERVER_API_KEY", "hunter2,hunter3")
    for arguments in (["config", "show"], ["config", "show", "--json"]):
        out = eft(*arguments).out
        assert "hunter" not in out
        assert "2 set (hidden)" in out


def test_several_keys_are_a_flag_given_several_times(eft: Eft) -> None:
    assert "2 set (hidden)" in eft("config", "show", "--api-key", "a", "--api-key", "b").out


LISTS = {
    "devices": ("cuda:1", "cuda:2"),
    "fair_weights": ("a" * 12 + "=1", "b" * 12 + "=2"),
    "cors_origins": ("http://a", "http://b"),
    "resolve_hub": ("a=org/one", "b=org/two@v2"),
}
FORMS = {"device": "cpu", "root_path": "/x", "tpot_ratio": "1.5"}
"""Values of fields that must have a form, or be within limits."""


@pytest.mark.parametrize("field", fields.fields(), ids=lambda field: field.flag)
def test_of_a_flag_given_twice_the_last_one_counts(eft: Eft, field: fields.Field) -> None:
    """A list collects them."""
    if field.base is bool:
        given = [field.flag, field.flag.replace("--", "--no-", 1)]
    elif field.base is tuple:
        given = [f"{field.flag}={value}" for value in LISTS.get(field.name, ("one", "two"))]
    else:
        number = field.unit or field.base in (int, float)
        usual = "0.5" if field.base is float and not field.unit else "7" if number else "x"
        last = FORMS.get(field.name, usual)
        given = [f"{field.flag}=wrong", f"{field.flag}={(field.choices or [last])[-1]}"]
    done = eft("config", "show", "--json", *given)
    assert done.code == 0, done.err
    section, _, name = field.key.partition(".")
    shown = json.loads(done.out)["settings"][section][name]["value"]
    if field.base is bool:
        assert shown is False
    elif field.base is tuple:
        assert len(shown) == 2 or shown == "2 set (hidden)"
    else:
        assert str(shown) == given[-1].partition("=")[2] or float(shown) == float(given[-1].partition("=")[2])


def test_every_problem_is_on_a_line_of_its_own(eft: Eft, tmp_path: Path) -> None:
    (tmp_path / "eft.toml").write_text("[server]\nprt = 1\n")
    done = eft("config", "show", "--max-n", "0")
    assert done.code == 2
    assert done.err.splitlines() == [
        "eft: file eft.toml: unknown key 'prt' in [server]; did you mean port?",
        "eft: limits.max_n (flag --max-n): expected a whole number of at least 1 (units: K, M), got 0",
    ]


def test_example_and_docs_are_the_generated_files(eft: Eft) -> None:
    assert eft("config", "example").out == render.example_toml()
    assert eft("config", "docs").out == render.reference()


@pytest.mark.parametrize("page", ["cli", "metrics"])
def test_reference_pages_are_as_generated(eft: Eft, page: str) -> None:
    checked_in = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert eft("config", page).out == checked_in, f"run: eft config {page} > docs/{page}.md"


def test_every_command_is_on_its_page(eft: Eft) -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert {f"## eft {name}" for name in ("serve", "jobs rerun", "config metrics")} <= set(page.splitlines())
    assert page.count("\n## eft ") == len(_LAZY)


def test_path(eft: Eft, tmp_path: Path) -> None:
    nothing = eft("config", "path")
    assert (nothing.code, nothing.out) == (1, "")
    (tmp_path / "eft.toml").touch()
    assert eft("config", "path").out.strip() == str(tmp_path / "eft.toml")
