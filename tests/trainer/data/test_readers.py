"""Rows out of files: pyarrow and the csv module write them, and bad ones are written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from runtime.errors import InvalidRequest
from runtime.trainer.data import readers
from runtime.trainer.data.files import DataFile
from runtime.trainer.data.problems import RowProblem
from runtime.trainer.data.readers import read_rows

ROWS = [
    {"text": "one\nline", "other": 'say "ü", 😀'},
    {"text": "", "other": " spaces "},
    {"text": "3", "other": "a,b"},
]


def read(path: Path, format: str | None = None) -> list[tuple[int, Any]]:
    found = list(read_rows(DataFile(path.name, path), format))
    return [(number, str(row) if isinstance(row, RowProblem) else row) for number, row in found]


def write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_come_back(tmp_path: Path, kind: str) -> None:
    expected = list(enumerate(ROWS, 1))
    assert read(write(tmp_path / f"rows.{kind}", kind)) == expected
    assert read(write(tmp_path / "rows", kind), kind) == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}", kind)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == list(enumerate(ROWS, 1))


def test_nested_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert read(tmp_path / "chat.parquet") == [(1, rows[0])]


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert read(path) == [(2, {"a": 1}), (4, {"a": 2})]


def test_bad_lines_have_their_numbers_and_do_not_end_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = b'{"a":' + b"[" * 100_000
    path.write_bytes(b'{"a": 1}\nnonsense\n{"a": "\xff"}\n[1]\n' + deep + b'\n{"a": 2}\n')
    rows = read(path)
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert "not JSON" in rows[1][1]
    assert "not UTF-8 text: byte 7 is 0xff" in rows[2][1]
    assert "not an object" in rows[3][1]
    assert "nested too deeply" in rows[4][1]
    assert rows[5][1] == {"a": 2}


def test_a_csv_record_of_another_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n\n3\n4,5\n")
    assert read(path) == [
        (1, {"a": "1", "b": "2"}),
        (3, "has 1 fields, and the header has 2"),
        (4, {"a": "4", "b": "5"}),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b'a,b\n"open', "line 2: unexpected end"),
        ("a.csv", b"a,a\n1,2\n", "names a column twice"),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8 text"),
        ("a.json", b"[1, 2", "not a JSON array"),
        ("a.json", b"[" * 100_000, "not a JSON array"),
        ("a.parquet", b"PAR1 nonsense PAR1", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.zst", b"", "give its format as ds_type"),
    ],
)
def test_files_that_are_not_of_their_format(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_line_without_end_is_not_read_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    with (tmp_path / name).open("wb") as stream:
        stream.write(b'{"a": 1}\n')
        stream.truncate(1 << 30)  # sparse: a gigabyte of NUL that takes no room
    with pytest.raises(InvalidRequest, match=r"row 2 is longer than 1000 bytes"):
        read(tmp_path / name)


def test_a_json_array_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_JSON", 10)
    (tmp_path / "a.json").write_text('[{"a": "text"}]')
    with pytest.raises(InvalidRequest, match="at most 10 bytes; use JSONL"):
        read(tmp_path / "a.json")


def test_a_parquet_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_GROUP", 1000)
    table = pyarrow.table({"text": [f"row {number}" * 20 for number in range(100)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InvalidRequest, match="row group 0 has"):
        read(tmp_path / "a.parquet")
