"""Rows out of files: pyarrow and the csv module write them, and bad ones are written by hand."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from runtime.errors import InvalidRequest
from runtime.trainer.data import readers
from runtime.trainer.data import readers as json_array
from runtime.trainer.data.example import RowProblem
from runtime.trainer.data.files import DataFile
from runtime.trainer.data.readers import read_rows

ROOT = Path(__file__).parents[3]
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
        ("a.csv", b"a,\xff\n1,2\n", "the header is not UTF-8 text"),
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


def parquet_texts(path: Path, texts: list[bytes]) -> None:
    """A column of texts, valid or not."""
    buffers = pyarrow.array(texts, pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), buffers)
    parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": column}), path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"text": "a\\ud800b"}', "column 'text' holds a lone surrogate (U+D800) at character 1"),
        (b'{"text": "\\uDFFF"}', "column 'text' holds a lone surrogate (U+DFFF) at character 0"),
        (b'{"text": "\\ud800\\ud800\\udc00"}', "column 'text' holds a lone surrogate (U+D800) at character 0"),
        (b'{"text": "\xed\xa0\x80"}', "column 'text' holds a lone surrogate (U+D800) at character 0"),
        (
            b'{"a": "ok", "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "\\udc00"}]}',
            "column 'messages', [1].content holds a lone surrogate (U+DC00) at character 0",
        ),
        (b'{"te\\ud800xt": 1}', "column 'te?xt' holds a lone surrogate (U+D800) at character 2"),
        (b'{"a": {"\\ud800": 1}}', "column 'a', a key holds a lone surrogate (U+D800) at character 0"),
        (b'{"a": "b: {", "text": "x\xff"}', "is not UTF-8 text: byte 24 is 0xff, in column 'text'"),
        (b'{"a": [{"x": 1, "y": "\xc3("}], "b": 2}', "is not UTF-8 text: byte 22 is 0xc3, in column 'a'"),
    ],
)
def test_text_that_is_no_unicode_is_named_by_row_and_column(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n' + data + b'\n{"text": "ok"}\n')
    assert read(path) == [(1, {"text": "😀"}), (2, problem), (3, {"text": "ok"})]


def test_text_that_is_no_unicode_in_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "ok"}, {"text": "a\\ud800"}]')
    assert read(path) == [(1, {"text": "ok"}), (2, "column 'text' holds a lone surrogate (U+D800) at character 1")]


def test_text_that_is_no_unicode_in_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,text\n1,ok\n2,"x\xed\xa0\x80"\n3,ok\n\xff,ok\n')
    assert read(path) == [
        (1, {"a": "1", "text": "ok"}),
        (2, "column 'text' is not UTF-8 text: character 1 is byte 0xed"),
        (3, {"a": "3", "text": "ok"}),
        (4, "column 'a' is not UTF-8 text: character 0 is byte 0xff"),
    ]
    parquet_texts(tmp_path / "rows.parquet", [b"ok", b"x\xed\xa0\x80", b"fine"])
    assert read(tmp_path / "rows.parquet") == [
        (1, {"n": 0, "text": "ok"}),
        (2, "column 'text' is not UTF-8 text: byte 1 is 0xed"),
        (3, {"n": 2, "text": "fine"}),
    ]


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


def memory_of_reading(path: Path) -> tuple[int, int]:
    """Rows of a file, and the most MiB that a process takes to read it beyond what it has before."""
    script = (
        "import resource, sys\nfrom pathlib import Path\nimport pyarrow.parquet\n"
        "from runtime.trainer.data.files import DataFile\nfrom runtime.trainer.data.readers import read_rows\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before, path = most(), Path(sys.argv[1])\n"
        "rows = sum(1 for _ in read_rows(DataFile(path.name, path)))\nprint(rows, most() - before)"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows, mebibytes = done.stdout.split()
    return int(rows), int(mebibytes)


def test_a_large_json_array_is_not_held_as_a_whole(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 1000}).encode()
    with (tmp_path / "a.json").open("wb") as stream:
        stream.write(b"[\n" + b",\n".join([row] * 100_000) + b"]\n")
    assert (tmp_path / "a.json").stat().st_size > 100_000_000
    rows, mebibytes = memory_of_reading(tmp_path / "a.json")
    assert rows == 100_000
    assert mebibytes < 30


def test_a_small_parquet_file_of_large_rows_is_not_held_as_a_whole(tmp_path: Path) -> None:
    """By its own metadata 1 MiB: a value of the dictionary, 1000 times. Decoded it would be a gigabyte."""
    table = pyarrow.table({"text": ["x" * 1024**2] * 1000})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size < 2 * 1024**2
    del table
    rows, mebibytes = memory_of_reading(tmp_path / "a.parquet")
    assert rows == 1000
    assert mebibytes < 150


def test_parquet_rows_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    parquet.write_table(pyarrow.table({"text": ["x" * 2000] * 40}), tmp_path / "a.parquet")
    with pytest.raises(InvalidRequest, match="rows 1 to 16 have 32"):
        read(tmp_path / "a.parquet")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", "],[", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(items=st.lists(JSON, max_size=8), chunk=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_the_items_of_an_array_wherever_the_file_is_cut(items: list[Any], chunk: int, indent: int | None) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        found = list(json_array.array_items(io.BytesIO(data), longest=10_000))
    assert [json.loads(item) for item in found] == items


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1}', "ends within row 1"),
        (b'[{"a": 1}, {"a": "x', "ends within row 2"),
        (b'[{"a": 1},, {}]', "row 2 is empty"),
        (b'[{"a": 1},]', "row 2 is empty"),
        (b'[{"a": 1}] {}', "something follows"),
    ],
)
def test_arrays_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InvalidRequest, match=f"not a JSON array: .*{message}"):
        read(tmp_path / "a.json")


def test_a_bad_item_of_an_array_has_its_number_and_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": nonsense}, 3, {"a": 2}]')
    rows = read(tmp_path / "a.json")
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert "not JSON" in rows[1][1]
    assert "not an object" in rows[2][1]
    assert rows[3][1] == {"a": 2}
