"""The demo model with an adapter, exported: the logits and greedy tokens of PEFT and of what is served."""

from pathlib import Path

import pytest
import torch

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.export.export import export_adapter
from runtime.workers.export_difference import measure_difference
from settings.schema import ModelSettings

pytestmark = pytest.mark.real_model
PROMPT = "The capital of France is"


@pytest.mark.parametrize(
    ("format", "type"), [("merged", "float32"), pytest.param("gguf", "f32", marks=pytest.mark.slow)]
)
def test_an_export_answers_as_what_is_served(demo_model: Path, tmp_path: Path, format: str, type: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint("demo")
    base = AutoModelForCausalLM.from_pretrained(demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "down_proj"])
    lora = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    lora.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([checkpoint.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        expected = lora(ids).logits

    out = tmp_path / ("merged" if format == "merged" else "out.gguf")
    export_adapter(checkpoint, tmp_path / "adapter", out, format, type=type)
    settings = ModelSettings(dtype="float32", device="cpu", max_model_len=512)
    found = measure_difference(checkpoint, tmp_path / "adapter", out, settings)
    assert found.same_tokens == 1.0
    assert found.largest < 1e-2
    if format == "merged":
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-3)
