"""Losses against autograd through transformers and PEFT: value and gradients, in slices, on ranks, through modules of
transformers, and with the fused head.

The formulas here are over whole log-probabilities, pair by pair; those of the trainer never see more than a slice.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

from kernels.training import TrainingOps
from runtime.engine.assembly import assemble
from runtime.model.fallback import FallbackDecoder
from runtime.model.group import Group
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example, collate
from runtime.trainer.fallback_step import FallbackStep
from runtime.trainer.lora import TrainableLora
from runtime.trainer.losses import Loss, Supervised, logprobs
from runtime.trainer.step import MicroStep
from settings.load import load as load_settings
from tests.model.rank_threads import in_ranks
from tests.parity.fallbacks import make_fallback
from tests.parity.gradients import adapter, drive, peft_model, peft_module
from tests.tiny import make_tiny_llama
from tests.trainer.losses.samples import ClippedPolicy, OddsRatio, documented_dpo
from tests.trainer.tiny_training import all_targets, examples, load_decoder

SHAPE = LoraShape(rank=4, alpha=12)
WEIGHTS = [1.0, -0.5, 2.0, 0.25]
DATA = [replace(one, weight=weight) for one, weight in zip(examples(4, longest=60), WEIGHTS, strict=True)]

Sequences = list[tuple[Tensor, Tensor, float]]
"""Log-probabilities of each sequence's targets with and without the adapter, and the sequence's weight."""


def dpo(data: Sequences) -> Tensor:
    ratios = [(own - base).sum() for own, base, _ in data]
    return torch.stack([softplus(-0.2 * (ratios[at] - ratios[at + 1])) for at in (0, 2)]).mean()


def odds_ratio(data: Sequences) -> Tensor:
    means = [own.mean() for own, _, _ in data]
    odds = [mean.exp() / (1 - mean.exp()) for mean in means]
    return torch.stack([-means[at] - 0.5 * logsigmoid((odds[at] / odds[at + 1]).log()) for at in (0, 2)]).mean()


def clipped_policy(data: Sequences) -> Tensor:
    tokens = []
    for own, base, weight in data:
        ratio = (own - base).exp()
        bound = ratio.clamp(max=1.4) if weight > 0 else ratio.clamp(min=0.6)
        tokens.append(-weight * bound)
    return torch.cat(tokens).mean()


def supervised(data: Sequences) -> Tensor:
    return torch.cat([-weight * own for own, _, weight in data]).mean()


CASES: dict[str, tuple[Loss, Callable[[Sequences], Tensor]]] = {
    "supervised": (Supervised(), supervised),
    "dpo": (documented_dpo()(beta=0.2), dpo),  # type: ignore[call-arg]
    "odds ratio": (OddsRatio(share=0.5), odds_ratio),
    "clipped policy": (ClippedPolicy(clip=0.4), clipped_policy),
}


def test_the_reference_of_a_run_that_goes_on_is_what_it_went_on_from(tmp_path: Path) -> None:
    """So at first no answer is preferred: both of a pair are as likely as under the reference."""
    decoder = load_decoder(make_tiny_llama(tmp_path / "model"))
    begun = adapter(decoder, replace(SHAPE, dora=True))
    first = begun.capture()
    batch = collate(DATA, decoder.device)
    found = {}
    for start in ("none", "reference"):
        lora = TrainableLora(decoder, all_targets(decoder), begun.shape, seed=9, start=start)
        lora.restore(first)
        micro = MicroStep(decoder, TrainingOps(), lora, batch, loss=CASES["dpo"][0])
        drive(micro.forward_backward(1 / 2), "odd")
        found[start] = micro.score.mean
        with torch.no_grad():
            for _, parameter in lora.parameters():
                parameter.mul_(1.1)
        lora.changed()
        again = MicroStep(decoder, TrainingOps(), lora, batch, loss=CASES["dpo"][0])
        drive(again.evaluate(), "whole")
        assert micro.reference is not None
        assert again.reference is not None
        torch.testing.assert_close(again.reference, micro.reference)  # it does not move with what is trained
    assert found["reference"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["none"] != pytest.approx(math.log(2), abs=1e-2)


def target_logprobs(model: Any, example: Example) -> Tensor:
    ids = torch.tensor([example.token_ids])
    found = log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return found.gather(1, ids[0, 1:, None]).squeeze(1)[torch.tensor(example.trained[1:])]


def oracle_value(model: Any, formula: Callable[[Sequences], Tensor]) -> Tensor:
    data = []
    for example in DATA:
        with model.disable_adapter(), torch.no_grad():
            base = target_logprobs(model, example)
        data.append((target_logprobs(model, example), base, example.weight))
    return formula(data)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of logits at once, and the vocabulary of 512 in several pieces."""
    monkeypatch.setattr(logprobs, "MOST_ROWS", 16)
    monkeypatch.setattr(logprobs, "LEAST_ROWS", 3)
    monkeypatch.setattr(logprobs, "LEAST_VOCABULARY", 100)
    monkeypatch.setattr(logprobs, "MOST_VOCABULARY", 150)


def units(loss: Loss) -> int:
    return loss.units([example.num_trained for example in DATA])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("slicing", ["whole", "least", "odd"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_equal_autograd_however_sliced(name: str, slicing: str, tmp_path: Path) -> None:
    loss, formula = CASES[name]
    path = make_tiny_llama(tmp_path / "model")
    decoder = load_decoder(path)
    lora = adapter(decoder, SHAPE)
    oracle = peft_model(path, lora)
    expected = oracle_value(oracle, formula)
    expected.backward()  # type: ignore[no-untyped-call]
    batch = collate(DATA, decoder.device)
    assert batch.num_trained > 3 * 16
    micro = MicroStep(decoder, TrainingOps(), lora, batch, loss=loss, checkpointing=slicing != "whole")
    drive(micro.forward_backward(1 / units(loss)), slicing)
    assert micro.score.mean == pytest.approx(expected.item(), rel=1e-4)
    assert micro.score.units == units(loss)
    assert micro.fraction == pytest.approx(1)
    most = 0.0
    for (layer, linear), adapted in lora.linears.items():
        assert adapted.a.grad is not None
        for part, grad_a, b in zip(adapted.parts, adapted.a.grad.split(SHAPE.rank), adapted.b, strict=True):
            module = peft_module(oracle, layer, linear, part)
            torch.testing.assert_close(grad_a, module.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(b.grad, module.lora_B["default"].weight.grad, atol=1e-4, rtol=1e-3)
            most = max(most, float(grad_a.abs().max()))
    assert most > 1e-2
    scored = MicroStep(decoder, TrainingOps(), lora, batch, loss=loss)
    drive(scored.evaluate(), slicing)
    assert scored.fraction == pytest.approx(1)
    assert scored.score.mean == pytest.approx(micro.score.mean, rel=1e-5)
    assert scored.score.metrics == pytest.approx(micro.score.metrics, rel=1e-4)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_does(name: str, tmp_path: Path) -> None:
    loss, _ = CASES[name]
    path = make_tiny_llama(tmp_path / "model")

    def work(group: Group) -> tuple[float, dict[str, Tensor]]:
        decoder = load_decoder(path, group)
        lora = random_adapter(decoder)
        micro = MicroStep(decoder, TrainingOps(), lora, collate(DATA, decoder.device), loss=loss)
        drive(micro.forward_backward(1 / units(loss)), "odd")
        grads = {key: parameter.grad for key, parameter in lora.parameters() if parameter.grad is not None}
        lora.shards.complete(grads)
        return micro.score.mean, lora.shards.gather(grads)

    ((expected, expected_grads),) = in_ranks(1, work)
    for found, grads in in_ranks(2, work):
        assert found == pytest.approx(expected, rel=1e-4)
        assert grads.keys() == expected_grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[key], atol=1e-4, rtol=1e-3)


def random_adapter(decoder: Any) -> TrainableLora:
    """The same on any number of ranks."""
    lora = adapter(decoder, SHAPE)
    generator = torch.Generator().manual_seed(4)
    whole = {key: torch.randn(x.shape, generator=generator) * 0.2 for key, x in lora.capture().items()}
    lora.restore(whole)
    return lora


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_modules_of_transformers(name: str, separable: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    loss, formula = CASES[name]
    make_fallback(tmp_path, "phi")
    decoder = assemble(load_settings(env={}, flags={"model": str(tmp_path), "num_blocks": 8}).settings).decoder
    assert isinstance(decoder, FallbackDecoder)
    decoder.separable = separable
    targets = {(layer, name): ("",) for layer in range(decoder.spec.num_layers) for name in decoder.targets}
    lora = TrainableLora(decoder, targets, SHAPE, seed=3)
    places = {place: f"{decoder.layers_path}.{place[0]}.{place[1]}" for place in lora.linears}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(places.values()), task_type="CAUSAL_LM")
    oracle = get_peft_model(base, config).eval()
    modules = {place: oracle.get_submodule(f"base_model.model.{path}") for place, path in places.items()}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for place, adapted in lora.linears.items():
            adapted.b[0].normal_(std=0.2, generator=generator)
            modules[place].lora_A["default"].weight.copy_(adapted.a)
            modules[place].lora_B["default"].weight.copy_(adapted.b[0])
    expected = oracle_value(oracle, formula)
    expected.backward()  # type: ignore[no-untyped-call]
    micro = FallbackStep(decoder, TrainingOps(), lora, collate(DATA, decoder.device), loss=loss)
    drive(micro.forward_backward(1 / units(loss)), "odd")
    assert micro.fraction == pytest.approx(1)
    assert micro.score.mean == pytest.approx(expected.item(), rel=1e-4)
    for place, adapted in lora.linears.items():
        torch.testing.assert_close(adapted.a.grad, modules[place].lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)
        grad = modules[place].lora_B["default"].weight.grad
        torch.testing.assert_close(adapted.b[0].grad, grad, atol=1e-4, rtol=1e-3)
    scored = FallbackStep(decoder, TrainingOps(), lora, collate(DATA, decoder.device), loss=loss)
    drive(scored.evaluate(), "least")
    assert scored.fraction == pytest.approx(1)
    assert scored.score.mean == pytest.approx(micro.score.mean, rel=1e-5)
