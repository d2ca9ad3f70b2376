"""The GGUF container against the `gguf` package, and against damaged files."""

import contextlib
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints import ModelLoadError, open_checkpoint
from runtime.checkpoints.gguf.container import GgufFile
from tests.checkpoints.gguf.files import write_gguf


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model)


def header(fields: bytes = b"", *, version: int = 3, num_fields: int = 0, num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + fields


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def opened(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_reads_what_the_reference_reads(tiny_gguf: Path) -> None:
    file, reference = GgufFile(tiny_gguf), GGUFReader(tiny_gguf)
    fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert file.fields == fields
    assert {name: (list(reversed(info.shape)), info.type, info.offset) for name, info in file.tensors.items()} == {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.value, tensor.data_offset)
        for tensor in reference.tensors
    }


def test_every_kind_of_value(tmp_path: Path) -> None:
    values = [
        (0, "<B", 200),
        (1, "<b", -3),
        (2, "<H", 60000),
        (3, "<h", -300),
        (4, "<I", 2**32 - 1),
        (5, "<i", -(2**31)),
        (6, "<f", 0.5),
        (7, "<?", True),
        (10, "<Q", 2**64 - 1),
        (11, "<q", -(2**63)),
        (12, "<d", 1e300),
    ]
    fields = b"".join(
        string(f"k{type}".encode()) + struct.pack("<I", type) + struct.pack(code, value) for type, code, value in values
    )
    file = opened(tmp_path, header(fields, num_fields=len(values)))
    assert file.fields == {f"k{type}": value for type, _, value in values}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Cannot read"),
        (b"PK\x03\x04 a zip file", "does not begin with the bytes GGUF"),
        (b"GGUF", "cut off"),
        (header(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(num_fields=2**63), "metadata fields are announced"),
        (header(num_tensors=2**40), "tensors are announced"),
        (header(struct.pack("<Q", 2**62) + b"x" * 20, num_fields=1), "cut off"),
        (header(string(b"\xff") + struct.pack("<IQ", 4, 0), num_fields=1), "not UTF-8"),
        (header(string(b"k") + struct.pack("<IQ", 99, 0), num_fields=1), "99 is not the number"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 0, 2**60), num_fields=1), "cut off"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**60), num_fields=1), "strings are announced"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 1), num_fields=1), "value type 9"),
        (header((string(b"k") + struct.pack("<IQ", 10, 1)) * 2, num_fields=2), "occurs twice"),
        (
            header(string(b"general.alignment") + struct.pack("<II", 4, 3), num_fields=1),
            "must be a power of two",
        ),
        (header(string(b"t") + struct.pack("<IIQ", 9, 0, 0) + bytes(32), num_tensors=1), "9 dimensions"),
        (header(string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 7), num_tensors=1), "not a multiple of 32"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        opened(tmp_path, data)
    assert "model.gguf" in str(caught.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"none\.gguf"):
        GgufFile(tmp_path / "none.gguf")


def test_a_file_cut_off_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(64), *range(64, len(data), 4001), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ModelLoadError):
            open_checkpoint(str(path))


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_end_in_another_error(
    tiny_gguf: Path, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    """Bytes of the metadata and the tensor list are overwritten. What still opens must be readable."""
    data = bytearray(tiny_gguf.read_bytes())
    end = min(info.offset for info in GgufFile(tiny_gguf).tensors.values())
    for at, byte in flips:
        data[int(at * (end - 1))] = byte
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelLoadError):
        checkpoint = open_checkpoint(str(path))
        assert all(name.startswith(("model.", "lm_head.")) for name, _ in checkpoint.tensors())
