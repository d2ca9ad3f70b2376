"""The loss as one op, in Triton's interpreter, against the loss that is cut along the vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.training import TrainingOps
from runtime.model_loading import load_decoder as load
from runtime.trainer import step
from runtime.trainer.clock import clock_of
from runtime.trainer.events import EvalEvent, RunEvent, StepEvent
from runtime.trainer.examples import Example
from runtime.trainer.loss import Score
from runtime.trainer.microbatch import pack
from runtime.trainer.slices import Slices
from runtime.trainer.spec import ScheduleSpec
from runtime.trainer.step import MicroStep
from runtime.workers.decoder import Decoder
from runtime.workers.loading import open_checkpoint
from runtime.workers.lora import LoraShape
from settings.schema import ModelSettings
from tests.kernels.triton_backend import DEVICE, TRAINING, TRITON
from tests.parity.test_lora_gradients import adapter
from tests.trainer.tiny_training import drive, examples, make_run, run_spec


@pytest.fixture(params=["none", "int8"])
def decoder(request: pytest.FixtureRequest, tiny_model: Path) -> Decoder:
    settings = ModelSettings(
        model=str(tiny_model), quantization=request.param, kernels="reference", device=DEVICE, dtype="float32"
    )
    return load(open_checkpoint(str(tiny_model)), settings)


def kinds(slices: Slices, grant: Callable[[int, int], int] = lambda least, amount: amount) -> list[str]:
    """Do the work, and tell what it was made of."""
    seen = []
    try:
        wanted = next(slices)
        while True:
            seen.append(wanted.kind)
            wanted = slices.send(grant(min(wanted.least, wanted.amount), wanted.amount))
    except StopIteration:
        return seen


def gradients(decoder: Decoder, ops: TrainingOps, data: list[Example]) -> tuple[Score, list[Tensor], list[str]]:
    """One micro-batch forwards and backwards."""
    lora = adapter(decoder, LoraShape(rank=4, alpha=8))
    micro = MicroStep(decoder, ops, lora, pack(data, decoder.device))
    seen = kinds(micro.forward_backward(1 / max(1, sum(example.num_trained for example in data))))
    grads = [parameter.grad for _, parameter in lora.parameters() if parameter.grad is not None]
    return micro.score, grads, seen


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 3.0)])
def test_gradients_of_the_adapters(decoder: Decoder, scale: float, softcap: float) -> None:
    """Each example begins with tokens that are not trained on."""
    decoder.spec = replace(decoder.spec, logit_scale=scale, logit_softcap=softcap)
    data = examples(3, longest=24)
    score, grads, seen = gradients(decoder, TRAINING, data)
    expected, wanted, cut = gradients(decoder, TrainingOps(), data)
    assert [kind for kind in seen if "loss" in kind] == ["fused_loss"]
    assert not [kind for kind in seen if "logits" in kind]
    assert [kind for kind in cut if "logits" in kind]
    assert score.tokens == expected.tokens == sum(example.num_trained for example in data)
    assert score.correct == expected.correct
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)
    assert len(grads) == len(wanted) > 0
    for found, other in zip(grads, wanted, strict=True):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_rows_are_cut_between_the_least_and_the_most(
    tiny_model: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "LEAST_FUSED", 5)
    monkeypatch.setattr(step, "MOST_FUSED", 16)
    data = pack(examples(3, longest=24), decoder.device)
    found = []
    for grant in (lambda least, amount: least, lambda least, amount: amount):
        micro = MicroStep(decoder, TRAINING, adapter(decoder, LoraShape(rank=4, alpha=8)), data)
        seen = kinds(micro.evaluate(), grant)
        found.append((seen.count("fused_score"), micro.score))
    assert [count for count, _ in found] == [-(-data.num_trained // 5), -(-data.num_trained // 16)]
    assert found[0][1].loss == pytest.approx(found[1][1].loss, rel=1e-6)
    assert found[0][1].correct == found[1][1].correct


def test_a_batch_of_which_nothing_is_trained_on(decoder: Decoder) -> None:
    masked = [replace(example, trained=[False] * len(example)) for example in examples(2)]
    for ops in (TRAINING, TrainingOps()):
        score, grads, seen = gradients(decoder, ops, masked)
        assert (score.loss, score.tokens) == (0.0, 0)
        assert not [kind for kind in seen if "loss" in kind or "logits" in kind]
        assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_a_run_ends_in_the_same_adapter(decoder: Decoder) -> None:
    """The trainer takes the op by itself where Triton serves."""
    runs = []
    for ops in (decoder.ops, TRITON):
        decoder.ops = ops
        events: list[RunEvent] = []
        spec = run_spec(decoder, schedule=ScheduleSpec(total_steps=2), eval_every=1)
        run = make_run(decoder, spec, events, test=[examples(1, seed=5, longest=12)], data=examples(4, longest=12))
        drive(run)
        losses = [event.loss for event in events if isinstance(event, StepEvent | EvalEvent)]
        runs.append((losses, run._lora.capture(), run._ops.fuses_loss(torch.zeros(1, 8, device=DEVICE))))
    (expected, wanted, cut), (found, weights, fused) = runs
    assert (cut, fused) == (False, True)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4)


def test_ranks_share_the_vocabulary_and_cut_it(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.trainer.fused_loss import fuses
    from runtime.workers.group import Member

    hidden = torch.zeros(1, 8, device=DEVICE)
    assert fuses(decoder, TRAINING, hidden)
    monkeypatch.setattr(decoder, "group", Member(2))
    assert not fuses(decoder, TRAINING, hidden)


def test_time_on_a_gpu_is_read_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock_of(torch.device("cpu"))()
    assert waited == []
    clock = clock_of(torch.device("cuda", 1))
    assert clock() <= clock()
    assert waited == [torch.device("cuda", 1)] * 2
