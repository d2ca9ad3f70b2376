"""The head as one op, in Triton's interpreter, against the head that is cut along the vocabulary."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantised import Weight
from kernels.training import TokenLosses, TrainingOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder as load
from runtime.events import EvalEvent, RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.model.group import UnconnectedRank
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example, collate
from runtime.trainer.losses import Score, logprobs
from runtime.trainer.slices import clock_of
from runtime.trainer.step import MicroStep
from settings.schema import ModelSettings
from tests.kernels.triton.backend import DEVICE, TRAINING, TRITON, TritonTrainingOps
from tests.parity.gradients import adapter
from tests.parity.gradients import drive as drive_slices
from tests.trainer.losses.samples import documented_dpo
from tests.trainer.tiny_training import drive, examples, make_run, run_spec


class CountingOps(TritonTrainingOps):
    """Notes the rows of each call of the op, and which of them had a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.with_grad: list[bool] = []

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Weight, targets: Tensor, shares: Tensor | None, **options: Any
    ) -> TokenLosses:
        self.rows.append(len(hidden))
        self.with_grad.append(shares is not None)
        return super().linear_cross_entropy(hidden, weight, targets, shares, **options)


@pytest.fixture(params=["none", "int8"])
def decoder(request: pytest.FixtureRequest, tiny_model: Path) -> Decoder:
    settings = ModelSettings(
        model=str(tiny_model), quantization=request.param, kernels="reference", device=DEVICE, dtype="float32"
    )
    return load(open_checkpoint(str(tiny_model)), settings)


def gradients(decoder: Decoder, ops: TrainingOps, data: list[Example]) -> tuple[Score, list[Tensor]]:
    """One micro-batch forwards and backwards."""
    lora = adapter(decoder, LoraShape(rank=4, alpha=8))
    micro = MicroStep(decoder, ops, lora, collate(data, decoder.device))
    drive_slices(micro.forward_backward(1 / max(1, sum(example.num_trained for example in data))), "whole")
    return micro.score, [parameter.grad for _, parameter in lora.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 3.0)])
def test_gradients_of_the_adapters(
    decoder: Decoder, scale: float, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example begins with tokens that are not trained on, and those are not computed."""
    decoder.spec = replace(decoder.spec, logit_scale=scale, logit_softcap=softcap)
    data = examples(3, longest=24)
    expected, wanted = gradients(decoder, TrainingOps(), data)
    with monkeypatch.context() as patch:  # logits of all rows are never there
        patch.setattr(Decoder, "logits", None)
        patch.setattr(Decoder, "head_rows", None)
        ops = CountingOps()
        score, grads = gradients(decoder, ops, data)
    trained = sum(example.num_trained for example in data)
    assert ops.rows == [trained] < [sum(map(len, data))]
    assert ops.with_grad == [True]
    assert score.tokens == expected.tokens == trained
    assert score.correct == expected.correct
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)
    assert len(grads) == len(wanted) > 0
    for found, other in zip(grads, wanted, strict=True):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_rows_are_cut_between_the_least_and_the_most(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LEAST_FUSED_ROWS", 5)
    monkeypatch.setattr(logprobs, "MOST_FUSED_ROWS", 16)
    data = collate(examples(6, longest=24), decoder.device)
    scores = []
    for how, most in (("least", 5), ("whole", 16)):
        ops = CountingOps()
        micro = MicroStep(decoder, ops, adapter(decoder, LoraShape(rank=4, alpha=8)), data)
        drive_slices(micro.evaluate(), how)
        assert sum(ops.rows) == data.num_trained > 16
        assert set(ops.rows[:-1]) == {most}
        assert ops.rows[-1] <= most
        assert not any(ops.with_grad)
        scores.append(micro.score)
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert scores[0].correct == scores[1].correct


def test_a_loss_over_pairs_passes_the_op_for_its_reference_its_value_and_its_gradient(decoder: Decoder) -> None:
    loss = documented_dpo()()
    data = collate(examples(4, longest=24), decoder.device)
    counting = CountingOps()
    found = []
    for ops in (counting, TrainingOps()):
        lora = adapter(decoder, LoraShape(rank=4, alpha=8))
        micro = MicroStep(decoder, ops, lora, data, loss=loss)
        drive_slices(micro.forward_backward(0.5), "whole")
        found.append((micro.score, [parameter.grad for _, parameter in lora.parameters()]))
    (score, grads), (expected, wanted) = found
    assert counting.with_grad == [False, False, True]
    assert score.loss == pytest.approx(expected.loss, rel=1e-4)
    assert score.metrics == pytest.approx(expected.metrics, rel=1e-3)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


def test_a_batch_of_which_nothing_is_trained_on(decoder: Decoder) -> None:
    masked = [replace(example, trained=[False] * len(example)) for example in examples(2)]
    counting = CountingOps()
    for ops in (counting, TrainingOps()):
        score, grads = gradients(decoder, ops, masked)
        assert (score.loss, score.tokens) == (0.0, 0)
        assert all(torch.count_nonzero(grad) == 0 for grad in grads)
    assert counting.rows == []


def test_a_run_ends_in_the_same_adapter(decoder: Decoder) -> None:
    """The trainer takes the op by itself where Triton serves."""
    runs = []
    for ops in (decoder.ops, TRITON):
        decoder.ops = ops
        events: list[RunEvent] = []
        spec = run_spec(decoder, total_steps=2, warmup_steps=0, eval_every=1)
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
    hidden = torch.zeros(1, 8, device=DEVICE)
    assert isinstance(logprobs.head_of(decoder, TRAINING, hidden), logprobs.FusedHead)
    monkeypatch.setattr(decoder, "group", UnconnectedRank(2))
    assert isinstance(logprobs.head_of(decoder, TRAINING, hidden), logprobs.ChunkedHead)


def test_time_on_a_gpu_is_read_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock_of(torch.device("cpu"))()
    assert waited == []
    clock = clock_of(torch.device("cuda", 1))
    assert clock() <= clock()
    assert waited == [torch.device("cuda", 1)] * 2
