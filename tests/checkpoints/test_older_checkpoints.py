"""Checkpoints of older transformers: computed tensors, indices left behind, heads beside tied embeddings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from runtime import LLM, SamplingParams
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.verification import ours
from runtime.model.config import ModelLoadError
from runtime.model.families import REGISTRY, find_model
from runtime.model.families.family import is_computed
from settings.schema import ModelSettings
from tests.parity.families import CASES, make_model
from tests.tiny import VOCAB_SIZE, make_tiny_llama, make_tiny_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = list(range(5, 25))
IN_ATTENTION = {
    "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "masked_bias": torch.tensor(-1e4),
    "rotary_emb.inv_freq": torch.ones(8),
    "rotary_emb.cos_cached": torch.ones(1, 1, 512, 16),
    "rotary_emb.sin_cached": torch.ones(1, 1, 512, 16),
    "rotary_emb.original_inv_freq": torch.ones(8),
    "rotary_emb.long_inv_freq": torch.ones(8),
    "rope.freqs": torch.ones(8),
    "attn_mask": torch.ones(8, 8, dtype=torch.bool),
    "mask": torch.ones(8, 8),
    "tril": torch.ones(8, 8),
}
"""What attention modules kept, under the names of every architecture."""
IN_MODEL = {
    "rotary_emb.cos_cached": torch.ones(512, 16),
    "rotary_emb.original_inv_freq": torch.ones(8),
    "rotary_emb_local.inv_freq": torch.ones(8),
    "rotary_emb.sliding_attention_inv_freq": torch.ones(8),
    "position_ids": torch.arange(8),
}


def add(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(load_file(path / WEIGHTS) | tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def logits(path: Path) -> torch.Tensor:
    return ours(load_decoder(open_checkpoint(str(path)), ModelSettings(model=str(path))))(IDS)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt-neox", "falcon 7b", "phi3", "qwen2", "gemma3", "stablelm", "mixtral", "olmo2"]
)
def test_computed_tensors_are_left_out(tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    expected = logits(tmp_path)
    family = find_model(json.loads((tmp_path / "config.json").read_text()))
    linear = next(name for name, place in family.LAYER.items() if place[0] == "out")
    attention, base = linear.rpartition(".")[0], family.LAYERS.rpartition(".")[0].rpartition(".")[0]
    tensors = {f"{family.LAYERS}1.{attention}.{name}": tensor.clone() for name, tensor in IN_ATTENTION.items()}
    add(tmp_path, **tensors, **{f"{base}.{name}": tensor.clone() for name, tensor in IN_MODEL.items()})
    assert torch.equal(logits(tmp_path), expected)


def test_no_weight_of_any_family_counts_as_computed() -> None:
    for family in REGISTRY.values():
        for name in family.LAYER:
            for kind in ("weight", "bias"):
                assert not is_computed(f"{family.LAYERS}0.{name.replace('*', '3')}.{kind}"), name
        assert not any(map(is_computed, family.OUTSIDE))


def test_other_tensors_are_refused_by_the_checkpoints_name(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    add(tmp_path, **{"model.layers.0.self_attn.extra_proj.weight": torch.ones(4)})
    with pytest.raises(ModelLoadError, match=r"has 'model\.layers\.0\.self_attn\.extra_proj\.weight', which this"):
        LLM(str(tmp_path), num_blocks=8)


def test_a_shape_that_does_not_fit_is_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    add(tmp_path, **{"model.layers.1.self_attn.k_proj.weight": torch.ones(16, 64)})
    with pytest.raises(
        ModelLoadError, match=r"k_proj\.weight: expected shape \[32, 64\], got \[16, 64\] .*head_dim 16"
    ):
        LLM(str(tmp_path), num_blocks=8)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("model.layers.0.mlp.down_proj.weight", "llama"),
        ("model.layers.1.block_sparse_moe.experts.3.w3.weight", "mixtral"),
        ("model.norm.weight", "llama"),
        ("lm_head.weight", "llama"),
        ("transformer.h.1.attn.c_attn.bias", "gpt2"),
        ("model.layers.0.self_attn.q_layernorm.norms.2.weight", "stablelm, options"),
    ],
)
def test_what_lacks_is_named_as_in_the_checkpoint(tmp_path: Path, name: str, case: str) -> None:
    kind, options = CASES[case]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[name]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelLoadError, match=f"lacks 1 weights, the first: {name}"):
        LLM(str(tmp_path), num_blocks=8)


# --- an index beside the file that it is not for ---------------------------------------------------------


def index_of(path: Path, names: list[str], file: str) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize("index", ["gone", "empty", "broken", "outside"])
def test_a_single_file_goes_before_an_index_of_others(tmp_path: Path, index: str) -> None:
    make_tiny_llama(tmp_path)
    expected = logits(tmp_path)
    names = sorted(load_file(tmp_path / WEIGHTS))
    if index == "gone":
        index_of(tmp_path, names, "model-00001-of-00002.safetensors")
    elif index == "outside":
        index_of(tmp_path, names, "../other.safetensors")
    else:
        (tmp_path / INDEX).write_text("{}" if index == "empty" else "{")
    with capture_logs() as logs:
        assert torch.equal(logits(tmp_path), expected)
    assert [line["index"] for line in logs if line["event"] == "index_ignored"] == [INDEX]


def test_an_index_of_the_single_file_and_another_is_kept(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    expected, tensors = logits(tmp_path), load_file(tmp_path / WEIGHTS)
    moved = {name: tensors.pop(name) for name in sorted(tensors)[:3]}
    save_file(tensors, tmp_path / WEIGHTS)
    save_file(moved, tmp_path / "more.safetensors")
    places = dict.fromkeys(tensors, WEIGHTS) | dict.fromkeys(moved, "more.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(tmp_path), expected)


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    names = sorted(load_file(tmp_path / WEIGHTS))
    (tmp_path / WEIGHTS).rename(tmp_path / "model-00001-of-00001.safetensors")
    left_out = "model.layers.0.mlp.down_proj.weight"
    index_of(tmp_path, [name for name in names if name != left_out], "model-00001-of-00001.safetensors")
    with pytest.raises(ModelLoadError, match=rf"the first: {left_out}$"):
        LLM(str(tmp_path), num_blocks=8)


# --- tied or not -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tied") / "m", tie_word_embeddings=True)


def theirs(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found


@pytest.mark.parametrize("head", ["another", "equal", "alone", "none", "another in bfloat16"])
def test_the_head_is_that_of_transformers(tied: Path, tmp_path: Path, head: str) -> None:
    path = shutil.copytree(tied, tmp_path / "m")
    tensors = load_file(path / WEIGHTS)
    embedding = tensors["model.embed_tokens.weight"]
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) * 0.15
    if head == "alone":
        del tensors["model.embed_tokens.weight"]
    if head != "none":
        value = {"another": other, "another in bfloat16": other.bfloat16()}.get(head, embedding.clone())
        tensors["lm_head.weight"] = value
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    with capture_logs() as logs:
        torch.testing.assert_close(logits(path), theirs(path), atol=1e-3, rtol=1e-3)
    said = [line["event"] for line in logs if line["event"] == "head_not_tied"]
    assert said == ["head_not_tied"] * head.startswith("another")
    (answer,) = LLM(str(path), num_blocks=64, quantization="int8").generate([IDS], SamplingParams(max_tokens=1))
    assert answer.token_ids


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon 7b", "smollm3", "qwen2 tied"])
def test_other_families_that_tie(tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    before = logits(tmp_path)
    config: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    assert find_model(config).spec(config).tied
    other = torch.randn(VOCAB_SIZE, 64, generator=torch.Generator().manual_seed(1)) * 0.15
    add(tmp_path, **{"lm_head.weight": other})
    after = logits(tmp_path)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, theirs(tmp_path), atol=1e-3, rtol=1e-3)
