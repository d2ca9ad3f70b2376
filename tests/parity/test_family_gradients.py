"""Training adapters on other families against PEFT: the same losses and gradients of every adapted linear."""

import json
from pathlib import Path

import pytest
import torch

from kernels.training import TrainingOps
from runtime.model.families import find_model
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import collate
from runtime.trainer.lora import TrainableLora
from runtime.trainer.step import MicroStep
from tests.parity.families import CASES, make_model
from tests.parity.gradients import data, drive
from tests.parity.packing import load
from tests.parity.peft_training import peft_loss

RANK, ALPHA = 4, 12
NAMES = [
    "mistral with a window",
    "qwen2 moe, options",
    "qwen3 with biases and windows",
    "phi4 mini",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "olmo2",
    "granite",
    "stablelm, options",
    "falcon 40b",
    "falcon in sequence",
    "smollm3",
]


WITH_MAGNITUDES = ["gpt2", "falcon 40b", "gemma2", "phi4 mini", "qwen3 with biases and windows"]


@pytest.mark.parametrize(
    ("name", "dora"), [*((name, False) for name in NAMES), *((name, True) for name in WITH_MAGNITUDES)]
)
def test_gradients_equal_peft(name: str, dora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_model(tmp_path, *CASES[name])
    decoder, family = load(tmp_path)
    assert family is find_model(json.loads((tmp_path / "config.json").read_text()))
    targets: dict[tuple[int, str], list[str]] = {}
    for layer in range(decoder.spec.num_layers):
        for linear, part in family.LORA_TARGETS.values():
            targets.setdefault((layer, linear), []).append(part)
    lora = TrainableLora(decoder, targets, LoraShape(rank=RANK, alpha=ALPHA, dora=dora), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in lora.parameters():
            if ".b." in key:
                parameter.normal_(std=0.2, generator=generator)
            if ".m." in key:
                parameter *= torch.rand(parameter.shape, generator=generator) + 0.5
    lora.changed()
    path, layers = family.layers(), range(decoder.spec.num_layers)
    modules = [f"{path}.{layer}.{one}" for layer in layers for one in family.LORA_TARGETS]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM", use_dora=dora)
    oracle = get_peft_model(base, config)
    places = {place: module for module, place in family.LORA_TARGETS.items()}
    named = {
        (layer, linear, part.part): oracle.get_submodule(f"base_model.model.{path}.{layer}.{places[linear, part.part]}")
        for (layer, linear), parts in lora.layers_of(lora.capture()).items()
        for part in parts
    }
    with torch.no_grad():
        for (layer, linear), parts in lora.layers_of(lora.capture()).items():
            for part in parts:
                module = named[layer, linear, part.part]
                module.lora_A["default"].weight.copy_(part.a)
                module.lora_B["default"].weight.copy_(part.b)
                if part.magnitude is not None:
                    module.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
    oracle.eval()
    trained = sum(example.num_trained for example in data())
    loss = peft_loss(oracle, data())
    loss.backward()
    micro = MicroStep(decoder, TrainingOps(), lora, collate(data(), decoder.device), checkpointing=True)
    drive(micro.forward_backward(1 / trained), "odd")
    assert micro.score.mean == pytest.approx(loss.item(), abs=1e-4)
    for (layer, linear), adapted in lora.linears.items():
        assert adapted.a.grad is not None
        for part_name, grad_a, b in zip(adapted.parts, adapted.a.grad.split(RANK), adapted.b, strict=True):
            module = named[layer, linear, part_name]
            torch.testing.assert_close(grad_a, module.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(b.grad, module.lora_B["default"].weight.grad, atol=1e-4, rtol=1e-3)
        for part_name, m in zip(adapted.parts, adapted.m, strict=dora):
            expected = named[layer, linear, part_name].lora_magnitude_vector["default"].weight.grad
            torch.testing.assert_close(m.grad, expected, atol=1e-4, rtol=1e-3)
