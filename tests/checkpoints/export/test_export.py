"""Exports of adapters against PEFT: merged directories, GGUF files, adapters alone, of families that differ."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.export import directory
from runtime.checkpoints.export.export import export_adapter
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.safetensors_files import MappedFile
from runtime.errors import InvalidRequest
from runtime.model.config import ModelLoadError
from runtime.text.own_tokens import OwnText
from runtime.workers.export_difference import measure_difference
from settings.schema import ModelSettings
from tests.checkpoints.gguf.families import write_family
from tests.parity.families import CASES, make_model
from tests.parity.packing import packed
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

IDS = torch.randint(0, 500, (24,), generator=torch.Generator().manual_seed(3))
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt-neox": ["query_key_value", "dense_h_to_4h"],
    "phi3": ["qkv_proj", "down_proj"],
    "falcon 7b": ["query_key_value", "dense"],
}
FROM_DIRECTORY = ["llama", "mistral with a window", "qwen2", "qwen2 tied", "qwen3", "olmo2", "granite", "smollm3"]
OTHERS = ["phi3", "gemma2", "gpt2", "gpt-neox", "falcon 7b", "mixtral"]


def make_base(path: Path, name: str, **options: Any) -> Path:
    model_type, known = CASES[name]
    if name == "gemma2":  # the file has no query_pre_attn_scalar: it is the size of a head
        known = {**known, "query_pre_attn_scalar": 16, "head_dim": 16}
    make_model(path, model_type, {**known, **options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(path)
    return path


def adapted(model: Path, name: str, path: Path, **config: Any) -> torch.Tensor:
    """Write a random adapter of PEFT's; returns PEFT's logits with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    fields = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS.get(name, ["q_proj", "k_proj", "o_proj"])} | config
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in lora.named_parameters():
        if "lora_magnitude" in key:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
        elif "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    lora.save_pretrained(path)
    with torch.no_grad():
        return lora(IDS[None]).logits[0]


def ours(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    return packed(load_decoder(open_checkpoint(str(path)), ModelSettings(dtype="float32", device="cpu")), [ids])


def close(found: torch.Tensor, expected: torch.Tensor, *, within: float = 2e-4) -> None:
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


@pytest.mark.parametrize("name", [*FROM_DIRECTORY, *OTHERS])
def test_a_merged_directory_is_peft_merged(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_base(tmp_path / "base", name)
    expected = adapted(model, name, tmp_path / "adapter", rank_pattern={"k_proj": 2})
    written = export_adapter(open_checkpoint(str(model)), tmp_path / "adapter", tmp_path / "out", "merged")
    close(ours(tmp_path / "out"), expected)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS[None]).logits[0]
    close(theirs, expected)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
        key: (value.shape, value.dtype) for key, value in after.items()
    }
    text = "One two, three."
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids
        == AutoTokenizer.from_pretrained(model)(text).input_ids
    )
    assert written.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_magnitudes_are_merged(name: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", name)
    expected = adapted(model, name, tmp_path / "adapter", use_dora=True)
    checkpoint = open_checkpoint(str(model))
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out", "merged")
    close(ours(tmp_path / "out"), expected)
    if name == "llama":
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out.gguf", "gguf", type="f32")
        close(ours(tmp_path / "out.gguf"), expected)
    with pytest.raises(ModelLoadError, match=r"magnitudes \(DoRA\).*export it as gguf, merged"):
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "lora.gguf", "gguf-lora")


@pytest.mark.parametrize("name", FROM_DIRECTORY)
def test_a_gguf_file_of_a_directory(name: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", name)
    expected = adapted(model, name, tmp_path / "adapter", use_rslora=True)
    checkpoint = open_checkpoint(str(model))
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out.gguf", "gguf", type="f32")
    close(ours(tmp_path / "out.gguf"), expected)
    read = open_checkpoint(str(tmp_path / "out.gguf"))
    for text in ("Hello, world! 12345", "naïve café\n\n  x", "東京"):
        assert read.tokenizer.encode(text) == checkpoint.tokenizer.encode(text)
    assert read.tokenizer.chat_template == checkpoint.tokenizer.chat_template
    assert read.tokenizer.eos_ids == checkpoint.tokenizer.eos_ids


def test_shapes_come_from_headers_and_each_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base(tmp_path / "base", "llama")
    adapted(model, "llama", tmp_path / "adapter")
    read: list[str] = []
    tensor = MappedFile.tensor

    def counted(self: MappedFile, name: str) -> torch.Tensor:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(MappedFile, "tensor", counted)
    export_adapter(open_checkpoint(str(model)), tmp_path / "adapter", tmp_path / "out.gguf", "gguf")
    assert sorted(read) == sorted(load_file(model / "model.safetensors"))


@pytest.mark.parametrize("name", [*FROM_DIRECTORY, *OTHERS])
def test_a_gguf_file_of_a_gguf_base(name: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", name)
    expected = adapted(model, name, tmp_path / "adapter")
    base = write_family(tmp_path / "base.gguf", model)
    export_adapter(open_checkpoint(str(base)), tmp_path / "adapter", tmp_path / "out.gguf", "gguf")
    close(ours(tmp_path / "out.gguf"), expected)
    before, after = (gguf.GGUFReader(tmp_path / file) for file in ("base.gguf", "out.gguf"))
    assert set(before.fields) - {"GGUF.tensor_count"} <= set(after.fields)
    changed = [
        one.name
        for one, other in zip(before.tensors, after.tensors, strict=True)
        if one.name == other.name and not np.array_equal(one.data, other.data)
    ]
    assert changed, "the adapter's linears"
    assert not [one for one in changed if "attn_" not in one and "ffn_" not in one]


def test_a_merged_directory_of_a_gguf_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_base(tmp_path / "base", "llama")
    expected = adapted(model, "llama", tmp_path / "adapter")
    base = open_checkpoint(str(write_family(tmp_path / "base.gguf", model)))
    export_adapter(base, tmp_path / "adapter", tmp_path / "out", "merged", type="float32")
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS[None]).logits[0], expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello there, 123").input_ids == base.tokenizer.encode("Hello there, 123")


def test_the_difference_is_that_of_the_type(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama", hidden_size=256, intermediate_size=256)
    adapted(model, "llama", tmp_path / "adapter")
    checkpoint = open_checkpoint(str(model))
    settings = ModelSettings(dtype="float32", device="cpu")
    found = []
    for type in ("f32", "f16", "q8_0", "q4_k"):
        path = tmp_path / f"{type}.gguf"
        export_adapter(checkpoint, tmp_path / "adapter", path, "gguf", type=type)
        found.append(measure_difference(checkpoint, tmp_path / "adapter", path, settings))
    exact, half, eight, four = found
    assert exact.largest < 1e-3
    assert exact.same_tokens == 1
    assert exact.divergence < half.divergence < eight.divergence < four.divergence
    assert half.divergence < 1e-3
    assert {one.tokens for one in found} == {exact.tokens}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen2"])
def test_an_adapter_alone_is_what_llama_cpp_adds(name: str, tmp_path: Path) -> None:
    """llama.cpp computes W x + alpha / rank * B A x, the rank that of the tensor."""
    model = make_base(tmp_path / "base", name)
    expected = adapted(model, name, tmp_path / "adapter", alpha_pattern={TARGETS.get(name, ["k_proj"])[0]: 31})
    base_file = write_family(tmp_path / "base.gguf", model)
    for source in {model, base_file} if name in FROM_DIRECTORY else {base_file}:
        out = tmp_path / f"{source.suffix or 'directory'}-lora.gguf"
        export_adapter(open_checkpoint(str(source)), tmp_path / "adapter", out, "gguf-lora")
        lora = gguf.GGUFReader(out)
        assert lora.fields["general.type"].contents() == "adapter"
        alpha = lora.fields["adapter.lora.alpha"].contents()
        factors = {tensor.name: tensor.data for tensor in lora.tensors}
        merged = tmp_path / f"{out.stem}-merged.gguf"
        merged.write_bytes(base_file.read_bytes())
        writable = gguf.GGUFReader(merged, "r+")
        for tensor in writable.tensors:
            if f"{tensor.name}.lora_a" in factors:
                a, b = factors[f"{tensor.name}.lora_a"], factors[f"{tensor.name}.lora_b"]
                np.add(tensor.data, alpha / len(a) * (b @ a), out=tensor.data)
        writable.data.flush()
        close(ours(merged), expected)


def test_a_large_model_becomes_shards(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(7)}
    directory.write_weights(tmp_path, iter(tensors.items()), max_shard=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "gpt-neox")
    adapted(model, "gpt-neox", tmp_path / "adapter")
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(ModelLoadError, match=r"not written of GPTNeoXForCausalLM from a directory; .*--model"):
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out" / "x.gguf", "gguf")
    with pytest.raises(InvalidRequest, match=r"type: expected one of f32, f16, bf16, q8_0, q4_k, got `q3`"):
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out" / "x.gguf", "gguf", type="q3")
    with pytest.raises(InvalidRequest, match=r"format: expected one of merged, peft, gguf, gguf-lora, got `onnx`"):
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out" / "x.gguf", "onnx")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "there", "merged")
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "there").iterdir())


LOUD = "{% for m in messages %}{{ m.role | upper }} {{ m.content }}<|im_end|>{% endfor %}"


def test_a_template_that_goes_with_the_adapter(tmp_path: Path) -> None:
    """It takes the base's place, and its end of a turn ends the answers."""
    base = open_checkpoint(str(make_base(tmp_path / "base", "llama")))
    adapted(tmp_path / "base", "llama", tmp_path / "adapter")
    for format in ("merged", "gguf", "peft"):
        export_adapter(base, tmp_path / "adapter", tmp_path / format, format, own=OwnText(template=LOUD), name="loud")
    assert (tmp_path / "peft" / "chat_template.jinja").read_text() == LOUD
    merged = open_checkpoint(str(tmp_path / "merged")).tokenizer
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hello"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(chat, tokenize=False)
    (tmp_path / "gguf").rename(tmp_path / "loud.gguf")
    for tokenizer in (merged, open_checkpoint(str(tmp_path / "loud.gguf")).tokenizer):
        assert tokenizer.render_chat(chat) == theirs == "USER hello<|im_end|>"
        assert tokenizer.turn_end.token_id == tokenizer.token_id("<|im_end|>")
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert merged.token_id("<|im_end|>") in generation["eos_token_id"]
    with pytest.raises(ModelLoadError, match=r"own chat template: .*not valid Jinja"):
        export_adapter(base, tmp_path / "adapter", tmp_path / "x", "merged", own=OwnText(template="{% if %}"))
