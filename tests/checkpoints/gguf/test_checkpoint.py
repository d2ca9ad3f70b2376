"""GGUF models against the Hugging Face directories that they were made from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.checkpoints import ModelLoadError, open_checkpoint
from tests.checkpoints.gguf.files import gguf_tensors, permute, write_gguf
from tests.tiny import make_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CONFIG_KEYS = (
    "architectures",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}],
    ids=["untied", "tied", "biases", "wide heads"],
)
def test_weights_and_config_are_the_original_ones(tmp_path: Path, overrides: dict[str, object]) -> None:
    model = make_tiny_llama(tmp_path / "model", **overrides)
    head_dim = {".attention.key_length": overrides.get("head_dim")}
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "it.gguf", model, metadata=head_dim)))

    expected = load_file(model / "model.safetensors")
    got = dict(checkpoint.tensors())
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name

    original = AutoConfig.from_pretrained(model)
    read = type(original)(**checkpoint.config)
    for key in CONFIG_KEYS:
        assert getattr(read, key) == getattr(original, key), key
    assert read.rope_parameters["rope_theta"] == original.rope_parameters["rope_theta"]
    assert checkpoint.name == "it"
    assert checkpoint.eos_ids == (2,)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_quantised_weights_are_what_the_reference_makes_of_them(tiny_model: Path, tmp_path: Path, name: str) -> None:
    type = GGMLQuantizationType[name]
    got = dict(open_checkpoint(str(write_gguf(tmp_path / "q.gguf", tiny_model, quantisation=type))).tensors())
    source = gguf_tensors(tiny_model)["blk.1.attn_q.weight"]
    reference = quants.dequantize(quants.quantize(source, type), type).astype(np.float32)
    q = got["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(permute(q.float().numpy(), 4), reference)


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    """llama.cpp writes what each frequency is divided by; transformers computes the frequencies."""
    model = make_tiny_llama(tmp_path / "model", rope_parameters=LLAMA3, head_dim=64)
    config = AutoConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = (plain / scaled).numpy()
    assert len(set(factors.round(3))) > 2  # not only 1 and 32, but what is blended too
    path = write_gguf(
        tmp_path / "it.gguf",
        model,
        metadata={".attention.key_length": 64},
        extra_tensors={"rope_freqs.weight": factors},
    )
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert checkpoint.config["rope_theta"] == 500000.0
    assert "rope_freqs.weight" not in dict(checkpoint.tensors())


def test_other_rope_factors_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "it.gguf", tiny_model, extra_tensors=factors)
    with pytest.raises(ModelLoadError, match="does not follow Llama 3's rope scaling"):
        open_checkpoint(str(path))


def test_linear_rope_scaling(tiny_model: Path, tmp_path: Path) -> None:
    metadata = {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "it.gguf", tiny_model, metadata=metadata)))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({".expert_count": 8}, r"MixtralForCausalLM has no tensor 'blk\.0\.ffn_"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({".block_count": None}, r"llama\.block_count is missing"),
        ({".attention.head_count": [4, 4]}, "must be an integer"),
        ({".rope.dimension_count": 8}, "only the size of a head"),
        ({".rope.freq_base": "high"}, "must be a number"),
        ({"tokenizer.ggml.pre": "chameleon"}, "supported are: smollm, refact"),
        ({"tokenizer.ggml.model": "t5"}, "supported are: gpt2, llama"),
        ({"tokenizer.ggml.merges": ["ab"]}, "must be pairs"),
        ({"tokenizer.ggml.merges": ["no such"]}, "cannot be made into a tokenizer"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 entries for 512 tokens"),
        ({"tokenizer.ggml.tokens": [str(n) for n in range(600)]}, "the embedding has 512 rows"),
        ({"tokenizer.ggml.tokens": ["a"] * 512}, "not all different"),
        ({"tokenizer.ggml.eos_token_id": 512}, "there are 512 tokens"),
        ({"tokenizer.chat_template": "{% if %}"}, "chat template is not valid Jinja: line 1"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_model: Path, tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    path = write_gguf(tmp_path / "it.gguf", tiny_model, metadata=metadata)
    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(str(path))


def test_heads_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf", tiny_model, metadata={".attention.head_count": 8})
    with pytest.raises(ModelLoadError, match=r"attn_k\.weight: it has 32 rows; 2 heads of 8 need 16"):
        list(open_checkpoint(str(path)).tensors())


def test_another_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf", tiny_model, architecture="mamba")
    with pytest.raises(ModelLoadError, match="'mamba' are not supported; supported are: llama, falcon, gemma2"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_that_the_reference_makes_of_them(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """Under Hugging Face's names and in its order of rows."""
    kind = GGMLQuantizationType[name]
    got = dict(open_checkpoint(str(write_gguf(tmp_path / "it.gguf", tiny_model, quantisation=kind))).tensors())
    for tensor, values in load_file(tiny_model / "model.safetensors").items():
        rows = values.numpy()
        if rows.ndim == 2:
            rows = quants.dequantize(quants.quantize(rows, kind), kind)
        np.testing.assert_array_equal(got[tensor].numpy(), rows)


def test_an_unsupported_block_format_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf", tiny_model, quantisation=GGMLQuantizationType.MXFP4)
    supported = r"F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, BF16\."
    with pytest.raises(ModelLoadError, match=rf"is in MXFP4, which is not supported; supported are: {supported}"):
        open_checkpoint(str(path))


def test_an_unknown_tensor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), dtype=np.float32)}
    with pytest.raises(ModelLoadError, match=r"no tensor 'blk\.0\.ffn_gate_inp\.weight'"):
        open_checkpoint(str(write_gguf(tmp_path / "it.gguf", tiny_model, extra_tensors=extra)))
