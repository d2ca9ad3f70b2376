"""The schema itself, and the two files that are generated from it."""

import re
from pathlib import Path

from settings import fields, render
from settings.load import load

ROOT = Path(__file__).parents[2]


def test_names_are_unique_and_documented() -> None:
    names = [field.name for field in fields.fields()]
    assert len(names) == len(set(names))
    for field in fields.fields():
        assert field.doc.endswith("."), field.key
        assert "\n" not in field.doc, field.key


def test_every_default_is_a_value_that_the_schema_accepts() -> None:
    for field in fields.fields():
        if field.default is not None:
            loaded = load(flags={field.name: field.default}, env={}, file=ROOT / "settings/eft.example.toml")
            assert getattr(getattr(loaded.settings, field.section), field.name) == field.default


def test_the_example_file_is_current() -> None:
    checked_in = (ROOT / "settings/eft.example.toml").read_text(encoding="utf-8")
    assert checked_in == render.example_toml(), "run: eft config example > settings/eft.example.toml"


def test_the_reference_page_is_current() -> None:
    checked_in = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert checked_in == render.reference(), "run: eft config docs > docs/settings.md"


def test_the_example_file_gives_every_key_when_uncommented(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(re.sub(r"(?m)^#(?=\w+ = )", "", render.example_toml()), encoding="utf-8")
    loaded = load(env={}, file=path)
    assert set(loaded.origins.values()) == {f"file {path}"}
    for field in fields.fields():
        if field.default is not None:  # the others hold an example
            assert getattr(getattr(loaded.settings, field.section), field.name) == field.default


def test_the_example_file_changes_nothing_as_it_is() -> None:
    loaded = load(env={}, file=ROOT / "settings/eft.example.toml")
    assert set(loaded.origins.values()) == {"default"}
