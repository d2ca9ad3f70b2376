"""GGUF's blocks kept as they are: the same values as inflated, and an engine that computes with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from kernels import Int4Weight, Int8GroupWeight
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.gguf.checkpoint import Q8_0, kept
from runtime.checkpoints.gguf.container import TensorInfo
from runtime.checkpoints.gguf.families import FAMILIES
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.attention import PackedAttention
from runtime.model.config import ModelLoadError
from runtime.model.decoder import Decoder
from runtime.model.lora_base import fingerprint
from settings.schema import ModelSettings
from tests.checkpoints.gguf.files import write_gguf

KINDS = {"Q4_0": Int4Weight, "Q4_1": Int4Weight, "Q8_0": Int8GroupWeight}


def decoder(path: Path, quantization: str, kernels: str = "auto") -> Decoder:
    settings = ModelSettings(model=str(path), quantization=quantization, kernels=kernels)  # type: ignore[arg-type]
    return load_decoder(open_checkpoint(str(path)), settings)


def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(5, 40)
    attention = PackedAttention(decoder.ops, [len(ids)], decoder.spec)
    with torch.inference_mode():
        return decoder.logits(decoder.forward(ids, torch.arange(len(ids)), attention))


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_the_inflated_weights(tiny_model: Path, tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "q.gguf", tiny_model, quantisation=GGMLQuantizationType[name])
    checkpoint = open_checkpoint(str(path))
    inflated, blocks = dict(checkpoint.tensors()), dict(checkpoint.blocks())
    assert inflated.keys() == blocks.keys()
    for key, weight in blocks.items():
        if isinstance(weight, torch.Tensor):
            assert weight.ndim == 1
            assert torch.equal(weight, inflated[key])
        else:
            assert isinstance(weight, KINDS[name])
            assert torch.equal(weight.dequantise(), inflated[key]), key


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_logits_are_nearly_those_of_the_inflated_model(
    tiny_model: Path, tmp_path: Path, name: str, kernels: str
) -> None:
    path = write_gguf(tmp_path / "q.gguf", tiny_model, quantisation=GGMLQuantizationType[name])
    ours, floats = decoder(path, "gguf", kernels), decoder(path, "none", kernels)
    expected = logits(floats)
    assert (logits(ours) - expected).std() < 0.05 * expected.std()  # activations of a byte each
    assert fingerprint(ours) == fingerprint(floats)  # so adapters of one fit the other
    memory = [
        sum(p.value.num_bytes for p in d.parameters().values() if p.quantised is not None) for d in (ours, floats)
    ]  # type: ignore[union-attr]
    assert memory[0] > 0 == memory[1]


def test_parts_in_different_formats_become_floats(tiny_model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "q.gguf", tiny_model, quantisation=GGMLQuantizationType.Q4_1)
    ours, floats = decoder(path, "none"), decoder(path, "none")
    down = ours.layers[0].linears["gate_up"].weight
    blocks = dict(open_checkpoint(str(path)).blocks())
    down.fill("gate", blocks["model.layers.0.mlp.gate_proj.weight"], ours.ops)
    assert down.quantised is None
    assert torch.equal(down.data, floats.layers[0].linears["gate_up"].weight.data)


def test_bytes_that_no_quantiser_writes_are_inflated() -> None:
    data = np.zeros((2, 34), dtype=np.uint8)
    info = TensorInfo("it", (2, 32), Q8_0, 0)
    assert kept(info, data.reshape(-1)) is not None
    data[1, 5] = 128  # -128, whose size has no place in a signed byte
    assert kept(info, data.reshape(-1)) is None


def test_other_files_have_no_blocks(tiny_model: Path) -> None:
    with pytest.raises(ModelLoadError, match="quantization gguf is for GGUF files"):
        decoder(tiny_model, "gguf")


@pytest.mark.parametrize(
    ("architecture", "name"), [("gptneox", "attn_qkv"), ("falcon", "attn_qkv"), ("llama", "attn_k")]
)
def test_rows_in_integers_move_as_floats_do(architecture: str, name: str) -> None:
    """All families' orders of rows; 4 heads of 16, two of them for keys and values."""
    family = FAMILIES[architecture]
    config = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "hidden_size": 64, "head_dim": 16
    }  # fmt: skip
    rows = {"gptneox": 192, "falcon": 128, "llama": 32}[architecture]
    values = torch.randint(0, 16, (rows, 32), generator=torch.Generator().manual_seed(0))
    weight = Int4Weight.of(values, torch.ones(rows, 1), torch.zeros(rows, 1))
    full = f"blk.3.{name}.weight"
    moved_name, moved = family.weight(full, weight, config)
    ((expected_name, expected),) = family.tensors(full, values.float(), config)
    assert moved_name == expected_name
    assert torch.equal(moved.dequantise(), expected)
    assert not torch.equal(expected, values.float())
