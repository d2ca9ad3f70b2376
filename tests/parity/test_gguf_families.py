"""GGUF files of every family against transformers on the weights that they were made from."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from runtime.checkpoints import Checkpoint, open_checkpoint
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from tests.checkpoints.gguf.families import write_family
from tests.parity.families import CASES, make_model
from tests.parity.packing import packed
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

NAMES = [
    "mistral with a window",
    "mistral without",
    "mixtral",
    "qwen2",
    "qwen2 tied",
    "qwen2 moe",
    "qwen3",
    "qwen3 moe without dense layers",
    "phi3",
    "phi3 with a window",
    "phi4 mini",
    "gemma2",
    "gemma3",
    "gemma3 with scaled rope",
    "gpt2",
    "gpt-neox",
    "gpt-neox in sequence",
    "olmo2",
    "granite",
    "stablelm",
    "stablelm, options",
    "falcon 7b",
    "falcon 40b",
    "falcon 11b",
    "smollm3",
]
MORE = {
    "qwen3 moe without dense layers": ("qwen3_moe", {**CASES["qwen3 moe"][1], "mlp_only_layers": []}),
    # The file has no query_pre_attn_scalar: it is the size of a head, but in the largest models.
    "gemma2": ("gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 9, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}),
    "gemma3 with scaled rope": (
        "gemma3_text",
        {
            "sliding_window": 9,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "rope_parameters": CASES["gemma3 with scaled rope"][1]["rope_parameters"],
        },
    ),
}
TOO = ("qwen2", "stablelm", "falcon 7b")
"""Those of which transformers reads the very same model out of the file; of others it leaves out what it does not know
(windows, sizes of heads), or refuses them."""


def load(checkpoint: Checkpoint) -> Decoder:
    model = find_model(checkpoint.config)
    spec = model.spec(checkpoint.config)
    cpu = torch.device("cpu")
    decoder = Decoder(spec, kernels.load("reference"), max_len=128, dtype=torch.float32, device=cpu)
    decoder.load(model.weights(checkpoint.tensors(), spec))
    return decoder


def write(name: str, path: Path) -> tuple[Path, Any]:
    """The file, and the model that it was made from."""
    model_type, options = MORE.get(name) or CASES[name]
    oracle = make_model(path, model_type, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(path)
    return write_family(path / "it.gguf", path), oracle


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_original(name: str, tmp_path: Path) -> None:
    path, oracle = write(name, tmp_path)
    ids = torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1))
    decoder = load(open_checkpoint(str(path)))
    with torch.no_grad():
        expected = oracle(ids.unsqueeze(0)).logits[0]
        assert (packed(decoder, [ids]) - expected).abs().max() < 1e-3
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", TOO)
def test_logits_equal_transformers_reading_the_same_file(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, _ = write(name, tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (packed(load(open_checkpoint(str(path))), [ids]) - oracle(ids.unsqueeze(0)).logits[0]).abs().max() < 1e-3
