"""Preference losses against TRL: value, metrics and gradients of every adapter, from log-probabilities that our decoder
computes in slices. The numbers are TRL's own: see `trl_numbers.py`. Tolerance 1e-4, float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.training import TrainingOps
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example, collate
from runtime.trainer.data.preferences import labelled, with_companions
from runtime.trainer.lora import TrainableLora
from runtime.trainer.losses import Cpo, Dpo, Kto, Loss, Orpo, Simpo
from runtime.trainer.step import MicroStep
from tests.parity.gradients import drive, peft_module
from tests.parity.trl_numbers import ALPHA, RANK, SHOWN, rows, sine_adapter, sine_model
from tests.trainer.tiny_training import all_targets, load_decoder

TRL: dict[str, Any] = json.loads((Path(__file__).parent / "trl_losses.json").read_text())

LOSSES: dict[str, Loss] = {
    "dpo": Dpo(beta=0.3),
    "dpo hinge": Dpo(beta=0.3, sigmoid=0, hinge=1),
    "dpo ipo": Dpo(beta=0.3, sigmoid=0, ipo=1),
    "dpo robust": Dpo(beta=0.3, sigmoid=0, robust=1, label_smoothing=0.1),
    "dpo sigmoid_norm": Dpo(beta=0.3, sigmoid=0, sigmoid_norm=1),
    "dpo nca_pair": Dpo(beta=0.3, sigmoid=0, nca_pair=1),
    "dpo sppo_hard": Dpo(beta=0.3, sigmoid=0, sppo_hard=1),
    "dpo apo_zero": Dpo(beta=0.3, sigmoid=0, apo_zero=1),
    "dpo apo_down": Dpo(beta=0.3, sigmoid=0, apo_down=1),
    "dpo sigmoid sft": Dpo(beta=0.3, sft=0.5),
    "kto": Kto(beta=0.3),
    "kto weights": Kto(beta=0.3, desirable_weight=0.2, undesirable_weight=1.5),
    "orpo": Orpo(beta=0.3),
    "cpo": Cpo(beta=0.3, sft=0.7),
    "cpo smoothed": Cpo(beta=0.3, sft=0.0, label_smoothing=0.2),
    "simpo": Simpo(beta=2.0, sft=0.0, gamma=0.6),
    "simpo sft": Simpo(beta=2.0, gamma=0.6),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sine_model(tmp_path_factory.mktemp("sines"))


def examples(loss: Loss) -> list[Example]:
    """The rows as a job lays them out."""
    made = []
    for row in rows():
        for answer in (row.chosen,) if isinstance(loss, Kto) else (row.chosen, row.rejected):
            example = Example([*row.prompt, *answer], [False] * len(row.prompt) + [True] * len(answer))
            made.append(labelled(example, row.label) if isinstance(loss, Kto) else example)
    return with_companions(made, {Orpo: "orpo", Kto: "kto"}.get(type(loss)), 64)


def test_every_number_of_trl_is_compared() -> None:
    assert LOSSES.keys() == TRL.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_value_metrics_and_gradients(name: str, path: Path) -> None:
    loss, expected = LOSSES[name], TRL[name]
    decoder = load_decoder(path)
    lora = TrainableLora(decoder, all_targets(decoder), LoraShape(rank=RANK, alpha=ALPHA), seed=0)
    oracle = sine_adapter(path)
    places = {}
    with torch.no_grad():
        for (layer, linear), adapted in lora.linears.items():
            for part, a, b in zip(adapted.parts, adapted.a.split(RANK), adapted.b, strict=True):
                module = peft_module(oracle, layer, linear, part)
                a.copy_(module.lora_A["default"].weight)
                b.copy_(module.lora_B["default"].weight)
                places[module.lora_A["default"].weight] = (layer, linear, part, "a")
                places[module.lora_B["default"].weight] = (layer, linear, part, "b")
    data = examples(loss)
    micro = MicroStep(decoder, TrainingOps(), lora, collate(data, decoder.device), loss=loss)
    drive(micro.forward_backward(1 / loss.units([example.num_trained for example in data])), "odd")
    assert micro.score.mean == pytest.approx(expected["loss"], rel=1e-4)
    metrics = loss.summary(micro.score.metrics)
    known = {key: value for key, value in expected["metrics"].items() if key != "nll_loss" or getattr(loss, "sft", 1)}
    assert metrics == pytest.approx(known, rel=1e-4, abs=1e-5)
    grads = _grads(lora)
    compared = 0
    for full, parameter in oracle.named_parameters():
        if (place := places.get(parameter)) is not None:
            found, theirs = grads[place], expected["grads"][full]
            assert float(found.norm()) == pytest.approx(theirs["norm"], rel=1e-4, abs=1e-6), full
            assert found.flatten()[:SHOWN].tolist() == pytest.approx(theirs["first"], rel=1e-3, abs=1e-5), full
            compared += 1
    assert compared == len(expected["grads"]) == 28


def _grads(lora: TrainableLora) -> dict[tuple[int, str, str, str], torch.Tensor]:
    found = {}
    for (layer, linear), adapted in lora.linears.items():
        assert adapted.a.grad is not None
        for part, grad_a, b in zip(adapted.parts, adapted.a.grad.split(RANK), adapted.b, strict=True):
            assert b.grad is not None
            found[layer, linear, part, "a"], found[layer, linear, part, "b"] = grad_a, b.grad
    return found
