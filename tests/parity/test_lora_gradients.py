"""Training against PEFT: the same base, the same adapter, the same losses and gradients, however it is sliced."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import collate
from runtime.trainer.lora import TrainableLora, TrainingAdaptation, pieces_of
from runtime.trainer.step import MicroStep
from tests.parity.gradients import adapter, drive, peft_model, peft_module
from tests.parity.llama import VARIANTS
from tests.parity.peft_training import peft_loss
from tests.tiny import make_tiny_llama
from tests.trainer.tiny_training import all_targets, examples, load_decoder

RANK, ALPHA = 4, 12
OPS = kernels.training_ops(kernels.load())
"""Of the fastest backend here."""
SLICING = ["whole", "least", "odd"]


def check(
    path: Path, *, slicing: str, checkpointing: bool, dora: bool = False, longest: int = 40, **shape: Any
) -> None:
    decoder = load_decoder(path)
    lora = adapter(decoder, LoraShape(rank=RANK, alpha=ALPHA, dora=dora, **shape))
    data = examples(3, longest=longest)
    oracle = peft_model(path, lora)
    loss = peft_loss(oracle, data)
    loss.backward()
    trained = sum(example.num_trained for example in data)
    micro = MicroStep(decoder, OPS, lora, collate(data, decoder.device), checkpointing=checkpointing)
    drive(micro.forward_backward(1 / trained), slicing)
    assert micro.score.tokens == trained
    assert micro.score.mean == pytest.approx(loss.item(), abs=1e-4)
    for (layer, linear), adapted in lora.linears.items():
        assert adapted.a.grad is not None
        for part, grad_a, b in zip(adapted.parts, pieces_of(adapted.a.grad, adapted.b), adapted.b, strict=True):
            module = peft_module(oracle, layer, linear, part)
            torch.testing.assert_close(grad_a, module.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(b.grad, module.lora_B["default"].weight.grad, atol=1e-4, rtol=1e-4)
        for part, m in zip(adapted.parts, adapted.m, strict=dora):
            module = peft_module(oracle, layer, linear, part)
            torch.testing.assert_close(
                m.grad, module.lora_magnitude_vector["default"].weight.grad, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("slicing", SLICING)
def test_gradients_equal_peft_however_sliced(slicing: str, checkpointing: bool, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model")
    check(path, slicing=slicing, checkpointing=checkpointing, longest=150)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("slicing", SLICING)
def test_dora_s_gradients_equal_peft_however_sliced(slicing: str, checkpointing: bool, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model")
    check(path, slicing=slicing, checkpointing=checkpointing, longest=150, dora=True, rslora=checkpointing)


@pytest.mark.parametrize("name", VARIANTS)
def test_dora_s_gradients_equal_peft_for_every_variant(name: str, tmp_path: Path) -> None:
    check(make_tiny_llama(tmp_path / "model", **VARIANTS[name]), slicing="odd", checkpointing=True, dora=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_peft_for_every_variant(name: str, tmp_path: Path) -> None:
    check(make_tiny_llama(tmp_path / "model", **VARIANTS[name]), slicing="odd", checkpointing=True)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7, "k_proj": 5, "self_attn.q_proj": 9, "proj": 6},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 32, r"layers\.1\..*_proj": 5.5, "gate_proj": 3},
}
"""Parts of one linear differ in rank, in scale, or in neither. One key is hidden by the first, one means nothing."""


@pytest.mark.parametrize("slicing", SLICING)
@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_linears_have_ranks_and_alphas_of_their_own(kind: dict[str, bool], slicing: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model")
    check(path, slicing=slicing, checkpointing=slicing == "odd", **PATTERNS, **kind)


def test_rank_stabilised_scaling_is_peft_s(tmp_path: Path) -> None:
    check(make_tiny_llama(tmp_path / "model"), slicing="whole", checkpointing=False, rslora=True)


class Masked(torch.nn.Module):
    """PEFT's dropout with our mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self._mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._mask


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_applied_as_in_peft(dora: bool, tmp_path: Path) -> None:
    """With magnitudes, they scale the product of the base for what dropout leaves."""
    path = make_tiny_llama(tmp_path / "model", attention_bias=True)
    decoder = load_decoder(path)
    lora = adapter(decoder, LoraShape(rank=RANK, alpha=ALPHA, dora=dora))
    data = examples(1, longest=60)
    tokens = len(data[0].token_ids)
    oracle = peft_model(path, lora, dropout=0.3)
    masks = TrainingAdaptation(lora, OPS, dropout=0.3, seed=11, rows=slice(0, tokens))
    for (layer, linear), adapted in lora.linears.items():
        mask = masks._mask(layer, linear, torch.zeros(tokens, adapted.linear.in_features), adapted.inputs)
        for part in adapted.parts:
            peft_module(oracle, layer, linear, part).lora_dropout["default"] = Masked(mask)
    loss = peft_loss(oracle, data)
    loss.backward()
    micro = MicroStep(decoder, OPS, lora, collate(data, decoder.device), dropout=0.3, seed=11)
    drive(micro.forward_backward(1 / data[0].num_trained), "odd")
    assert micro.score.mean == pytest.approx(loss.item(), abs=1e-4)
    for (layer, linear), adapted in lora.linears.items():
        module = peft_module(oracle, layer, linear, adapted.parts[0])
        assert adapted.a.grad is not None
        expected = module.lora_A["default"].weight.grad
        torch.testing.assert_close(adapted.a.grad[:RANK], expected, atol=1e-4, rtol=1e-4)
        if dora:
            expected = module.lora_magnitude_vector["default"].weight.grad
            torch.testing.assert_close(adapted.m[0].grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slicing", SLICING)
def test_dropout_is_the_same_however_sliced(slicing: str, tmp_path: Path) -> None:
    """PEFT draws other masks, so the oracle is our own pass without slices."""
    decoder = load_decoder(make_tiny_llama(tmp_path / "model"))
    data = collate(examples(3, longest=150), decoder.device)
    losses, grads = [], []
    for how, checkpointing in (("whole", False), (slicing, True)):
        lora = adapter(decoder, LoraShape(rank=RANK, alpha=ALPHA))
        micro = MicroStep(decoder, OPS, lora, data, dropout=0.3, seed=11, checkpointing=checkpointing)
        drive(micro.forward_backward(1.0), how)
        losses.append(micro.score.loss)
        grads.append(
            torch.cat([parameter.grad.flatten() for _, parameter in lora.parameters() if parameter.grad is not None])
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-3, rtol=1e-3)
    other = MicroStep(decoder, OPS, adapter(decoder, LoraShape(RANK, ALPHA)), data, dropout=0.3, seed=12)
    drive(other.forward_backward(1.0), "whole")
    assert other.score.loss != pytest.approx(losses[0], rel=1e-5)


def test_an_evaluation_scores_what_training_would(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny_llama(tmp_path / "model"))
    lora = adapter(decoder, LoraShape(rank=RANK, alpha=ALPHA))
    data = collate(examples(3), decoder.device)
    trained = MicroStep(decoder, OPS, lora, data)
    drive(trained.forward_backward(1.0), "whole")
    evaluated = MicroStep(decoder, OPS, lora, data)
    drive(evaluated.evaluate(), "least")
    assert evaluated.score.loss == pytest.approx(trained.score.loss, rel=1e-5)
    assert evaluated.score.correct == trained.score.correct


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny_llama(tmp_path / "model"))
    data = collate(examples(3), decoder.device)
    fresh = TrainableLora(decoder, all_targets(decoder), LoraShape(rank=4, alpha=8), seed=0)
    nothing = TrainableLora(decoder, {}, LoraShape(rank=4, alpha=8), seed=0)
    scores = []
    for lora in (fresh, nothing):
        micro = MicroStep(decoder, OPS, lora, data)
        drive(micro.evaluate(), "whole")
        scores.append(micro.score.loss)
    assert scores[0] == scores[1]
