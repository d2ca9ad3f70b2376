"""An adapter for GPT-2, whose linears PEFT knows as transposed (`fan_in_fan_out`): its factors are like any other's."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from runtime.checkpoints.peft import read_adapter, write_adapter
from runtime.model.lora_base import LoraBase
from tests.parity.adapted import our_logits
from tests.parity.families import CASES, make_model
from tests.parity.packing import load

IDS = torch.randint(0, 128, (30,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dora", [False, True])
def test_logits_equal_pefts_both_ways(dora: bool, tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    oracle = get_peft_model(
        make_model(model, *CASES["gpt2"]),
        LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM", use_dora=dora),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in oracle.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    oracle.save_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    with torch.no_grad():
        expected = oracle.eval()(IDS.unsqueeze(0)).logits[0]
    decoder, family = load(model)
    base = LoraBase.of(decoder, family, "tiny")
    assert (our_logits(decoder, base, adapter, IDS) - expected).abs().max() < 1e-4
    read = read_adapter(adapter, base, max_rank=8)
    write_adapter(tmp_path / "ours", read.layers, read.shape, base)
    again = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(model), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (again(IDS.unsqueeze(0)).logits[0] - expected).abs().max() < 1e-4
