"""Tools and their calls out of Parquet and JSONL: the same, as transformers would render them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from runtime.trainer.data.files import DataFile
from runtime.trainer.data.messages import Chat, ChatRows, tool_calls_of, without_nulls
from runtime.trainer.data.readers import read_rows
from runtime.trainer.recipe import Dataset

EXAMPLES = settings(max_examples=40)

NAMES = st.sampled_from(["city", "n", "unit", "deep"])
SCALARS = st.sampled_from(["Oslo", "text"])
OBJECTS = st.dictionaries(NAMES, SCALARS, min_size=1, max_size=3)
NESTED = st.dictionaries(st.sampled_from(["a", "b"]), OBJECTS, min_size=1, max_size=2)


def row(properties: Any, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}],
        "messages": [
            {"role": "user", "content": "w"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "five", "tool_calls": []},
        ],
    }


def read(rows: list[dict[str, Any]], folder: Path, kind: str) -> list[Chat]:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    reader = ChatRows(Dataset(path="a"), system=None, template=None)
    return [reader.read(found) for _, found in read_rows(DataFile(path.name, path)) if isinstance(found, dict)]


@EXAMPLES
@given(rows=st.lists(st.builds(row, NESTED, NESTED), min_size=1, max_size=4))
def test_parquet_and_json_lines_give_the_same(rows: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    """Parquet gives every object the keys of all rows; none of those reaches the template."""
    folder = tmp_path_factory.mktemp("rows")
    found = read(rows, folder, "parquet")
    assert found == read(rows, folder, "jsonl")
    for one, chat in zip(rows, found, strict=True):
        assert chat.tools == one["tools"]
        assert chat.messages[1]["tool_calls"] == one["messages"][1]["tool_calls"]
        assert "tool_calls" not in chat.messages[3]


def test_arguments_that_are_text_are_parsed() -> None:
    def arguments(given: Any) -> Any:
        return tool_calls_of([{"function": {"name": "f", "arguments": given}}], 1)[0]["function"]["arguments"]

    assert arguments('{"city": "Oslo", "n": null}') == {"city": "Oslo", "n": None}
    assert arguments({"city": "Oslo", "n": None}) == {"city": "Oslo"}
    for text in ("Oslo", "[1]", "3", "", "{"):  # what a template prints as it stands
        assert arguments(text) == text
    assert tool_calls_of('[{"function": {"name": "f", "arguments": "{}"}}]', 1) == [
        {"function": {"name": "f", "arguments": {}}}
    ]


def test_a_map_of_parquets_is_an_object(tmp_path: Path) -> None:
    column = pyarrow.array([[("city", "Oslo")]], type=pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table({"arguments": column}), tmp_path / "a.parquet")
    ((_, found),) = read_rows(DataFile("a.parquet", tmp_path / "a.parquet"))
    assert isinstance(found, dict)
    assert without_nulls(found) == {"arguments": {"city": "Oslo"}}


@pytest.mark.parametrize("value", [{"a": [{"b": None, "c": [None, 1]}], "d": None}])
def test_nulls_go_at_every_depth_and_stay_in_lists(value: Any) -> None:
    assert without_nulls(value) == {"a": [{"c": [None, 1]}]}
