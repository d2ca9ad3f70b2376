"""Adapters against PEFT: its files in our decoder give its logits, and ours in PEFT give ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.peft import read_adapter, write_adapter
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from settings.schema import ModelSettings
from tests.adapter_files import ALL, make_adapter, peft_logits
from tests.parity.adapted import our_logits
from tests.parity.llama import load

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(5))

VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "one part of three": {"target_modules": ["k_proj"]},
    "mlp": {"target_modules": ["up_proj", "down_proj"]},
    "by a regular expression": {"target_modules": r".*\.(q|o|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "without some": {"exclude_modules": ["o_proj"]},
    "rslora": {"use_rslora": True, "r": 9},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 32, r"layers.0.*up_proj": 1}},
    "dora": {"use_dora": True},
    "dora, one part of three": {"use_dora": True, "target_modules": ["v_proj", "gate_proj"], "use_rslora": True},
    "both, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True},
}


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load(tiny_model)[0]


@pytest.fixture(scope="module")
def base(decoder: Decoder) -> LoraBase:
    return LoraBase.of(decoder, Llama, "tiny")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_pefts(name: str, decoder: Decoder, base: LoraBase, tiny_model: Path, tmp_path: Path) -> None:
    path = make_adapter(tiny_model, tmp_path / "adapter", **VARIANTS[name])
    expected = peft_logits(tiny_model, path, IDS.tolist())
    assert (our_logits(decoder, base, path, IDS) - expected).abs().max() < 1e-4
    with torch.no_grad():
        attention = PackedAttention(decoder.ops, [len(IDS)], decoder.spec)
        plain = decoder.logits(decoder.forward(IDS, torch.arange(len(IDS)), attention))
    assert (plain - expected).abs().max() > 0.05  # the comparison is not one of adapters that do nothing


@pytest.mark.parametrize("name", VARIANTS)
def test_what_we_write_peft_loads(
    name: str, decoder: Decoder, base: LoraBase, tiny_model: Path, tmp_path: Path
) -> None:
    theirs = make_adapter(tiny_model, tmp_path / "theirs", **VARIANTS[name])
    adapter = read_adapter(theirs, base, max_rank=64)
    write_adapter(tmp_path / "ours", adapter.layers, adapter.shape, base)
    expected = our_logits(decoder, base, theirs, IDS)
    assert (peft_logits(tiny_model, tmp_path / "ours", IDS.tolist()) - expected).abs().max() < 1e-4
    assert torch.equal(our_logits(decoder, base, tmp_path / "ours", IDS), expected)


def test_bfloat16_is_as_near_as_pefts(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    path = make_adapter(tiny_model, tmp_path / "adapter")
    truth = peft_logits(tiny_model, path, IDS.tolist())
    oracle = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), path)
    with torch.no_grad():
        theirs = (oracle.eval()(IDS.unsqueeze(0)).logits[0].float() - truth).abs().mean()
    rough = load(tiny_model, torch.bfloat16)[0]
    ours = (our_logits(rough, LoraBase.of(rough, Llama, "tiny"), path, IDS) - truth).abs().mean()
    assert 0 < ours <= 1.5 * theirs


def test_the_fingerprint_is_of_the_weights_and_not_of_the_form_that_they_are_held_in(
    base: LoraBase, tiny_model: Path
) -> None:
    for quantization in ("int8", "int4"):
        settings = ModelSettings(model=str(tiny_model), quantization=quantization)
        decoder = load_decoder(open_checkpoint(str(tiny_model)), settings)
        assert LoraBase.of(decoder, Llama, "tiny").fingerprint == base.fingerprint
    rough = load(tiny_model, torch.bfloat16)[0]
    assert LoraBase.of(rough, Llama, "other name").fingerprint == base.fingerprint
    rough.parameters()["layers.1.down.weight"].data.mul_(1.1)
    assert LoraBase.of(rough, Llama, "tiny").fingerprint != base.fingerprint
    assert {name.rpartition(".")[2] for name in base.targets} == set(ALL)
