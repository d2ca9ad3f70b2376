"""Scores of padded rows against transformers' own loss, and the loss scale."""

from pathlib import Path

import pytest
import torch

from runtime.trainer.data.example import Example
from runtime.trainer.launched.scoring import ScoredModel, call, pad, without_adapters
from runtime.trainer.launched.spread import LossScale
from tests.tiny import make_tiny_llama


def test_padded_rows_score_as_transformers_loss_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tiny")).eval()
    examples = [
        Example([5, 6, 7, 8, 9], [False, False, True, True, True]),
        Example([10, 11, 12], [False, True, True], weight=0.5),
    ]
    batch = pad(examples, torch.device("cpu"))
    with torch.no_grad():
        logprobs, correct = call(ScoredModel(model, None), batch)
    assert (batch.trained, len(logprobs), len(correct)) == ((3, 2), 5, 5)
    for example, part in zip(examples, logprobs.split(list(batch.trained)), strict=True):
        ids = torch.tensor([example.token_ids])
        labels = torch.where(torch.tensor([example.trained]), ids, -100)
        with torch.no_grad():
            expected = model(input_ids=ids, labels=labels).loss
        assert float(-part.mean()) == pytest.approx(float(expected), abs=1e-5)


def test_a_model_without_its_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tiny")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = base(ids).logits.clone()
        model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
        assert not torch.equal(model(ids).logits, expected)
        with without_adapters(model):
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)
    assert all(one.requires_grad for name, one in model.named_parameters() if "lora_" in name)


def test_the_scale_of_the_loss_follows_overflows() -> None:
    scale, off = LossScale(enabled=True), LossScale(enabled=False)
    first = scale.value
    scale.settle(finite=False)
    assert scale.value == first / 2
    for _ in range(LossScale.GROWTH_STEPS):
        scale.settle(finite=True)
    assert scale.value == first
    while not scale.exhausted:
        scale.settle(finite=False)
    assert scale.value == LossScale.LEAST
    off.settle(finite=False)
    assert (off.value, off.exhausted) == (1.0, False)
