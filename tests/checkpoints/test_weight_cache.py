"""Cached quantised weights: the same model as without them, and never one of other files or a broken cache."""

import os
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from kernels import QuantisedWeight
from runtime.checkpoints import open_checkpoint, weight_cache
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.decoder import Decoder
from runtime.model.lora_base import fingerprint
from settings.schema import ModelSettings
from tests.tiny import make_tiny_llama


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_cache, "LEAST_WEIGHTS", 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


def loaded(model: Path, quantization: str = "int8", **settings: object) -> tuple[Decoder, list[str]]:
    """The decoder, and the events of its loading."""
    asked = ModelSettings(model=str(model), quantization=quantization, device="cpu", **settings)  # type: ignore[arg-type]
    with capture_logs() as logs:
        decoder = load_decoder(open_checkpoint(str(model)), asked)
    return decoder, [log["event"] for log in logs if log.get("source") == "weights" or "cached" in log["event"]]


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "weights").glob("*"))


def floats(decoder: Decoder) -> dict[str, torch.Tensor]:
    values = {name: parameter.value for name, parameter in decoder.parameters().items()}
    return {name: one.dequantise() if isinstance(one, QuantisedWeight) else one for name, one in values.items()}


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
def test_a_second_start_has_the_same_weights_and_quantises_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    first, events = loaded(model, quantization)
    assert events == []
    (file,) = files(tmp_path)
    assert file.name.endswith(f".{quantization}")
    monkeypatch.setattr("runtime.model.layers.Parameter.quantise", None)
    second, events = loaded(model, quantization)
    assert events == ["cached_weights"]
    before, after = floats(first), floats(second)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
        assert type(first.parameters()[name].value) is type(second.parameters()[name].value)
    assert fingerprint(first) == fingerprint(second)


def test_other_files_and_other_forms_have_files_of_their_own(model: Path, tmp_path: Path) -> None:
    loaded(model)
    loaded(model, "int4")
    weights = model / "model.safetensors"
    found = weights.stat()
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    _, events = loaded(model)
    assert events == []
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "end", "index", "empty"])
def test_a_broken_file_is_not_used_and_is_replaced(model: Path, tmp_path: Path, damage: str) -> None:
    expected = floats(loaded(model)[0])
    (file,) = files(tmp_path)
    data = file.read_bytes()
    broken = {
        "cut": data[:1000],
        "end": data[:-1] + b"?",
        "index": data[:-16] + (1 << 40).to_bytes(8, "little") + data[-8:],
        "empty": b"",
    }
    file.write_bytes(broken[damage])
    decoder, events = loaded(model)
    assert "cached_weights_not_used" in events
    assert all(torch.equal(values, floats(decoder)[name]) for name, values in expected.items())
    assert loaded(model)[1] == ["cached_weights"]


def test_a_tensor_outside_of_the_file_is_refused(model: Path, tmp_path: Path) -> None:
    loaded(model)
    (file,) = files(tmp_path)
    data = file.read_bytes().replace(b'"offset":0,', b'"offset":9999999,', 1)
    length = int.from_bytes(data[-16:-8], "little") + 6
    file.write_bytes(data[:-16] + length.to_bytes(8, "little") + data[-8:])
    assert "cached_weights_not_used" in loaded(model)[1]


def test_it_can_be_off_and_small_or_plain_models_have_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(model, cache_quantised=False)
    loaded(model, "none")
    monkeypatch.setattr(weight_cache, "LEAST_WEIGHTS", 10**9)
    loaded(model)
    assert files(tmp_path) == []


def test_a_full_disk_stops_the_writing_and_no_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "SPARE", 10**12)
    decoder, events = loaded(model)
    assert events == ["weights_not_cached"]
    assert decoder.parameters()["embedding.weight"].quantised is not None
    assert files(tmp_path) == []


def test_the_last_used_files_stay(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "MAX_FILES", 2)
    loaded(model)
    loaded(model, "int4")
    for number, file in enumerate(sorted(files(tmp_path), key=lambda path: path.suffix)):
        os.utime(file, (number, number))
    loaded(model, "int4")  # used now: int8 is the older one
    (tmp_path / "cache" / "weights" / "left.partial").write_bytes(b"x")
    loaded(model, "nf4")
    assert sorted(path.suffix for path in files(tmp_path)) == [".int4", ".nf4"]
