"""GPTQ, AWQ and bitsandbytes checkpoints: against the formats' formulas, and against bitsandbytes itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import Int4Weight, Int8GroupWeight, Nf4Weight, QuantisedWeight
from runtime import LLM, SamplingParams
from runtime.checkpoints import ModelLoadError, open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from settings.schema import ModelSettings
from tests.checkpoints.quantised_files import write_quantised
from tests.parity.packing import packed
from tests.tiny import make_tiny_llama

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(1))
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for groups of 128 inputs."""
    return make_tiny_llama(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=384)


def oracle_logits(path: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers, with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in json.loads((path / "config.json").read_text()).items() if k != "quantization_config"}
    oracle = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    oracle.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        logits: torch.Tensor = oracle(IDS.unsqueeze(0)).logits[0]
    return logits


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_stay_integers(model: Path, tmp_path: Path, method: str, group: int, symmetric: bool) -> None:
    path = write_quantised(model, tmp_path / "q", method, group=group, symmetric=symmetric)
    meant = load_file(path / "dequantised.file")
    got = dict(open_checkpoint(str(path)).tensors())
    assert got.keys() == meant.keys()
    for name, weight in got.items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, meant[name])
            assert not name.endswith("_proj.weight")
        else:
            assert isinstance(weight, Int4Weight)
            # The minimum, -zero * scale, is rounded to float16; with a zero of 8 it is exact.
            limit = 0.0 if symmetric else 15 * float(weight.scales.max()) * 2**-11
            assert (weight.dequantise() - meant[name]).abs().max() <= limit + 1e-7


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_both_versions_of_gptq(model: Path, tmp_path: Path, version: str) -> None:
    path = write_quantised(model, tmp_path / "q", "gptq", symmetric=False, checkpoint_format=version)
    weight = dict(open_checkpoint(str(path)).tensors())[Q]
    assert isinstance(weight, Int4Weight)
    assert (weight.dequantise() - load_file(path / "dequantised.file")[Q]).abs().max() < 1e-3


def test_act_order_becomes_floats_exactly(model: Path, tmp_path: Path) -> None:
    path = write_quantised(model, tmp_path / "q", "gptq", group=64, desc_act=True)
    meant = load_file(path / "dequantised.file")
    for name, weight in open_checkpoint(str(path)).tensors():
        assert isinstance(weight, torch.Tensor)
        torch.testing.assert_close(weight, meant[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_logits_are_those_of_the_dequantised_model(model: Path, tmp_path: Path, method: str) -> None:
    path = write_quantised(model, tmp_path / "q", method, group=128)
    expected = oracle_logits(path, load_file(path / "dequantised.file"))
    decoder = load_decoder(open_checkpoint(str(path)), ModelSettings(model=str(path)))
    assert isinstance(decoder.layers[0].linears["qkv"].weight.quantised, QuantisedWeight)
    with torch.no_grad():
        # Activations have a byte each here, and the oracle's are floats.
        assert (packed(decoder, [IDS]) - expected).std() < 0.05 * expected.std()
    tokens = LLM(str(path)).generate([IDS.tolist()], SamplingParams(max_tokens=1, temperature=0.0))[0].token_ids
    assert tokens == [int(expected[-1].argmax())]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; of GPTQ only 4 are supported"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "supported are: gptq, gptq_v2"),
        ({"quant_method": "awq", "bits": 8}, "bits is 8; of AWQ only 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "of AWQ only gemm is supported"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "fp8"}, "supported are: gptq, awq, bitsandbytes"),
        (["gptq"], "must be an object"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tiny_model: Path, tmp_path: Path, config: Any, message: str) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("lacking", [".qzeros", ".scales"])
def test_a_linear_that_is_not_whole_is_named(model: Path, tmp_path: Path, lacking: str) -> None:
    path = write_quantised(model, tmp_path / "q", "awq")
    tensors = load_file(path / "model.safetensors")
    del tensors[Q.removesuffix(".weight") + lacking]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=rf"layers\.1\.self_attn\.q_proj: not a linear of AWQ: \{lacking} is missing"
    ):
        list(open_checkpoint(str(path)).tensors())


def bitsandbytes_model(model: Path, path: Path, **options: Any) -> Any:
    """Quantised by bitsandbytes through transformers, saved by it to `path`."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(**options)
    oracle = LlamaForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32, device_map="cpu")
    oracle.save_pretrained(path)
    for file in model.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return oracle.eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_in_four_bits(model: Path, tmp_path: Path, kind: str, double: bool) -> None:
    oracle = bitsandbytes_model(
        model, tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    from bitsandbytes.functional import dequantize_4bit

    for name, weight in open_checkpoint(str(tmp_path)).tensors():
        module = oracle.get_submodule(name.removesuffix(".weight"))
        if name.endswith("_proj.weight"):
            expected = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            assert isinstance(weight, Nf4Weight) == (kind == "nf4")
            floats = weight if isinstance(weight, torch.Tensor) else weight.dequantise()
            torch.testing.assert_close(floats, expected, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(weight, module.weight.data)


def test_bitsandbytes_in_eight_bits(model: Path, tmp_path: Path) -> None:
    bitsandbytes_model(model, tmp_path, load_in_8bit=True)
    original = load_file(model / "model.safetensors")
    for name, weight in open_checkpoint(str(tmp_path)).tensors():
        if name.endswith("_proj.weight"):
            assert isinstance(weight, Int8GroupWeight)
            largest = original[name].abs().amax(1, keepdim=True)
            assert ((weight.dequantise() - original[name]).abs() <= largest / 127 * 0.51 + 2e-3).all()
    decoder = load_decoder(open_checkpoint(str(tmp_path)), ModelSettings(model=str(tmp_path)))
    assert isinstance(decoder.layers[1].linears["gate_up"].weight.quantised, QuantisedWeight)


def test_packing_of_the_tests_is_what_the_formats_say() -> None:
    """Words by hand: GPTQ's eight inputs from the lowest bits on; AWQ's order of outputs."""
    from tests.checkpoints.quantised_files import AWQ_ORDER, pack_rows

    values = np.arange(8)[None]
    assert int(pack_rows(values).view(np.uint32)[0, 0]) == 0x76543210
    assert int(pack_rows(values, AWQ_ORDER).view(np.uint32)[0, 0]) == 0x75316420
