"""Hugging Face directories, against what transformers reads from them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runtime.checkpoints import ModelLoadError, open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def shard(model: Path, *, files: int = 3) -> Path:
    """Split the weights of a model over several files with an index, as save_pretrained does."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    return model


def test_weights_are_what_transformers_loads(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model))
    expected = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    got = dict(checkpoint.tensors())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_everything_but_the_weights(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model))
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.source == tiny_model
    assert checkpoint.config == json.loads((tiny_model / "config.json").read_text())
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.tokenizer.bos_id == 1
    assert checkpoint.tokenizer.vocab_size == 512


def test_weights_can_be_read_twice(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model))
    assert [name for name, _ in checkpoint.tensors()] == [name for name, _ in checkpoint.tensors()]


def test_sharded_weights(tiny_model: Path, copy: Path) -> None:
    expected = load_file(tiny_model / "model.safetensors")
    got = dict(open_checkpoint(str(shard(copy))).tensors())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_relative_directory_has_its_own_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert open_checkpoint(".").name == "copy"


def drop_shard(model: Path) -> None:
    (shard(model) / "model-00002-of-00003.safetensors").unlink()


def index_outside(model: Path) -> None:
    index = json.loads((shard(model) / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def index_wrong_file(model: Path) -> None:
    index = json.loads((shard(model) / INDEX).read_text())
    index["weight_map"]["model.made_up.weight"] = "model-00001-of-00003.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def index_empty(model: Path) -> None:
    (shard(model) / INDEX).write_text('{"weight_map": {}}')


def several_without_index(model: Path) -> None:
    (shard(model) / INDEX).unlink()


def cut_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def huge_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")


def empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    no_weights(model)
    torch.save({}, model / "pytorch_model-00001-of-00002.bin")


def quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


def config_list(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def config_broken(model: Path) -> None:
    (model / "config.json").write_text('{"a": ')


def config_deep(model: Path) -> None:
    (model / "config.json").write_text('{"a":' + "[" * 200_000)


def config_bytes(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a": "\xff"}')


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def adapter_only(model: Path) -> None:
    no_config(model)
    (model / "adapter_config.json").write_text("{}")


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"1 are missing: model-00002-of-00003\.safetensors"),
        (index_outside, r"model\.norm\.weight must be in a safetensors file beside the index"),
        (index_wrong_file, r"lacks model\.made_up\.weight"),
        (index_empty, "has no weight_map"),
        (several_without_index, "holds 3 safetensors files"),
        (cut_weights, r"model\.safetensors cannot be read as safetensors"),
        (cut_header, r"model\.safetensors cannot be read as safetensors"),
        (huge_header, r"model\.safetensors cannot be read as safetensors"),
        (empty_weights, r"model\.safetensors cannot be read as safetensors"),
        (no_weights, "holds no weights"),
        (pickled, r"pytorch_model-00001-of-00002\.bin.*refused.*\n.*save_pretrained"),
        (quantised, "Weights quantised with 'hqq' cannot be loaded; supported are: gptq, awq, bitsandbytes"),
        (config_list, "must hold a JSON object, got list"),
        (config_broken, "not valid JSON"),
        (config_deep, "not valid JSON"),
        (config_bytes, "not valid JSON"),
        (no_config, r"holds no config\.json"),
        (adapter_only, "name its base model"),
        (no_tokenizer, "holds no tokenizer"),
        (broken_tokenizer, r"tokenizer\.json is not a tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(str(copy))


def test_the_way_to_convert_a_pickled_checkpoint_works(copy: Path, tiny_model: Path) -> None:
    """The command that the refusal prints is run, and what it writes is loaded."""
    expected = load_file(tiny_model / "model.safetensors")
    no_weights(copy)
    torch.save(expected, copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError) as refusal:
        open_checkpoint(str(copy))
    code = str(refusal.value).split('python -c "')[1].split('"\n')[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    got = dict(open_checkpoint(f"{copy}-safetensors").tensors())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_descriptions_are_the_tensors_without_values(copy: Path) -> None:
    checkpoint = open_checkpoint(str(shard(copy)))

    def shapes(tensors: Iterator[tuple[str, Any]]) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors]

    assert shapes(checkpoint.described()) == shapes(checkpoint.tensors())
    assert all(torch.is_tensor(tensor) and tensor.is_meta for _, tensor in checkpoint.described())
