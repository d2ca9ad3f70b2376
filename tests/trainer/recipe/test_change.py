"""Recipes with changes, and back to YAML: what is written is read as it was."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.trainer.recipe.change import changed_recipe, flat_keys, write_document
from runtime.trainer.recipe.document import read_document

RECIPE = b"""# A comment.
learning_rate: 2e-4
name: "1e4"
lora_r: 8
datasets:
  - {path: a.jsonl, split: 'train[:10%]'}
  - path: b.jsonl
"""


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"learning_rate": 1e-5}, "learning_rate", 1e-5),
        ({"lr": 3e-4}, "learning_rate", 3e-4),
        ({"rank": 4}, "lora_r", 4),
        ({"datasets[1].split": "train[:5]"}, "datasets[1].split", "train[:5]"),
        ({"publish.when": "never"}, "publish.when", "never"),
        ({"lora_r": None}, "lora_r", None),
        ({"absent": None}, "absent", None),
        ({"datasets": [{"path": "c"}]}, "datasets[1].path", None),
        ({}, "name", "1e4"),
    ],
)
def test_a_change(changes: dict[str, Any], key: str, value: Any) -> None:
    found = flat_keys(read_document(changed_recipe(RECIPE, changes)).values)
    assert found.get(key) == value
    before = flat_keys(read_document(RECIPE).values)
    same = {name: one for name, one in before.items() if name.split("[")[0] not in ("datasets", key)}
    assert same.items() <= found.items()


@pytest.mark.parametrize("path", ["datasets[2].path", "learning_rate.x", "a b", "", "datasets.path", "lora_r[0]", "."])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        changed_recipe(RECIPE, {path: 1})
    assert raised.value.param == f"set.{path}"


def test_too_many_changes() -> None:
    with pytest.raises(InvalidRequest, match="101 changes"):
        changed_recipe(RECIPE, {f"a{n}": 1 for n in range(101)})


def test_changes_that_are_too_large_or_too_deep() -> None:
    deep: Any = 1
    for _ in range(600):
        deep = [deep]
    for changes, text in (({"a": "x" * 70_000}, "at most 65536"), ({"a": deep}, "nested too deep")):
        with pytest.raises(InvalidRequest, match=text) as raised:
            changed_recipe(RECIPE, changes)
        assert raised.value.param == "set"


SCALARS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.sampled_from(["1e4", "no", "yes", "~", "null", "0o17", ".5", "1_000", "true", "-", "a: b", "#x", " x ", "é🦎"])
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, min_size=1, max_size=4))
def test_what_is_written_is_read_back(values: dict[str, Any]) -> None:
    assert read_document(write_document(values)).values == values
