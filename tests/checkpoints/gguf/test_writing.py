"""Written GGUF files, read by llama.cpp's own Python package and by our reader."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoints.gguf.blocks import FORMATS, dequantise
from runtime.checkpoints.gguf.container import GgufFile
from runtime.checkpoints.gguf.writing import (
    BF16,
    F16,
    F32,
    Q4_K,
    Q8_0,
    OutTensor,
    encode_field,
    quantise,
    type_for,
    value_of,
    write_gguf,
)

FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "ü", ""],
    "tokenizer.ggml.scores": [0.5, -1.0, 0.0],
    "tokenizer.ggml.token_type": [1, 3, 6],
}


def written(values: np.ndarray, type: int) -> np.ndarray:
    blocks = np.concatenate([np.asarray(part) for part in quantise(type, values)])
    return dequantise(FORMATS[type], blocks).reshape(values.shape)


def test_both_readers_read_what_was_written(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    path = tmp_path / "model.gguf"
    types = (F32, F16, BF16, Q8_0, Q4_K)
    tensors = [OutTensor(f"t{one}", values.shape, one, lambda one=one: quantise(one, values)) for one in types]
    fields = {key: encode_field(key, value_of(value)) for key, value in FIELDS.items()}
    write_gguf(path, fields, [*tensors, OutTensor("vector", (3,), F32, lambda: [values[:, 0].copy().view(np.uint8)])])

    ours = GgufFile(path)
    assert ours.fields == FIELDS
    theirs = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in theirs.tensors}
    assert set(found) == {f"t{one}" for one in types} | {"vector"} == set(ours.tensors)
    for one in types:
        info = ours.tensors[f"t{one}"]
        blocks = np.frombuffer(ours.data, np.uint8, FORMATS[one].num_bytes(values.size), info.offset)
        mine = dequantise(FORMATS[one], blocks).reshape(values.shape)
        expected = gguf.dequantize(found[f"t{one}"].data, gguf.GGMLQuantizationType(one)).reshape(values.shape)
        np.testing.assert_array_equal(mine, expected)
        assert info.shape == (3, 256)
    assert theirs.fields["llama.rope.freq_base"].contents() == 10000.0


@pytest.mark.parametrize("type", [F16, BF16, Q8_0])
def test_blocks_equal_those_of_the_gguf_package(type: int) -> None:
    values = np.random.default_rng(type).normal(size=(64, 512)).astype(np.float32)
    ours = np.concatenate([np.asarray(part) for part in quantise(type, values)])
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType(type)).view(np.uint8).reshape(-1)
    same = (ours == theirs).mean()
    assert same > 0.9999, "but for a tie that is rounded another way"


@pytest.mark.parametrize(("type", "most"), [(F16, 1e-3), (BF16, 4e-3), (Q8_0, 6e-3), (Q4_K, 0.075)])
def test_the_error_is_that_of_the_format(type: int, most: float) -> None:
    values = np.random.default_rng(1).normal(size=(128, 1024)).astype(np.float32)
    error = np.sqrt(np.square(written(values, type) - values).mean()) / values.std()
    assert error < most


@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=256, max_size=256),
    type=st.sampled_from([F32, F16, BF16, Q8_0, Q4_K]),
)
def test_a_value_is_at_most_a_step_away(values: list[float], type: int) -> None:
    array = np.asarray(values, dtype=np.float32)
    found = written(array, type)
    step = {F32: 0.0, F16: 0.5, BF16: 4.0, Q8_0: np.abs(array).max() / 100}.get(type, np.ptp([*values, 0.0]) / 6)
    assert np.abs(found - array).max() <= step + 1e-6


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros(512, dtype=np.float32)
    for type in (F16, BF16, Q8_0, Q4_K):
        assert not written(zeros, type).any()


@pytest.mark.parametrize(
    ("wanted", "shape", "expected"),
    [(Q4_K, (4, 512), Q4_K), (Q4_K, (4, 96), Q8_0), (Q4_K, (4, 50), F16), (Q8_0, (4, 50), F16), (F16, (4, 50), F16),
     (Q8_0, (512,), F32), (F16, (4, 64), F16)],
)  # fmt: skip
def test_rows_that_are_no_whole_blocks_take_a_larger_type(wanted: int, shape: tuple[int, ...], expected: int) -> None:
    assert type_for(wanted, shape) == expected


def test_data_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t: 4 bytes were given for 8"):
        write_gguf(tmp_path / "x.gguf", {}, [OutTensor("t", (2,), F32, lambda: [np.zeros(4, np.uint8)])])
