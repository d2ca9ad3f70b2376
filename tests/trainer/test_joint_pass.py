"""A pass over micro-batches of several jobs: each job's losses and gradients are those of its pass alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.training import TrainingOps
from runtime.model.decoder import Decoder
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import collate
from runtime.trainer.lora import TrainableLora
from runtime.trainer.losses import make_loss
from runtime.trainer.slices import Slices
from runtime.trainer.step import BrokenPass, MicroStep, OfferedMicro
from tests.trainer.tiny_training import ALL_PARTS, examples, load_decoder

LOSSES = {"supervised": {}, "dpo": {"beta": 0.3}, "orpo": {"beta": 0.2}, "kto": {"beta": 0.1}}


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


def drive(slices: Slices, cuts: Sequence[int]) -> None:
    """To its end, each slice cut to the next of `cuts` where that is allowed."""
    count = 0
    try:
        wanted = next(slices)
        while True:
            granted = max(min(wanted.least, wanted.amount), min(wanted.amount, cuts[count % len(cuts)]))
            count += 1
            wanted = slices.send(granted)
    except StopIteration:
        pass


class Part:
    """One job's micro-batch, made anew with each `step`."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        seed: int,
        rank: int,
        linears: Sequence[str],
        layers: int,
        loss: str,
        pairs: int,
        longest: int,
        initial: str = "uniform",
        start: Any = "none",
        **options: Any,
    ) -> None:
        """`layers`: the last ones, which are trained."""
        self._decoder = decoder
        self._options = options
        self._seed = seed
        self.loss = make_loss(loss, LOSSES[loss])
        self.data = examples(2 * pairs, seed=seed, longest=longest)
        targets = {(layer.index, name): ALL_PARTS[name] for layer in decoder.layers[-layers:] for name in linears}
        shape = LoraShape(rank=rank, alpha=2.0 * rank)
        self.lora = TrainableLora(decoder, targets, shape, seed=seed, initial=initial, start=start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in self.lora.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    @property
    def weight(self) -> float:
        return 1 / self.loss.units([example.num_trained for example in self.data])

    def step(self) -> MicroStep:
        for _, parameter in self.lora.parameters():
            parameter.grad = None
        batch = collate(self.data, self._decoder.device)
        return MicroStep(
            self._decoder, TrainingOps(), self.lora, batch, loss=self.loss, seed=self._seed, **self._options
        )

    def gradients(self) -> dict[str, Tensor]:
        found = {name: parameter.grad for name, parameter in self.lora.parameters()}
        return {name: grad.clone() for name, grad in found.items() if grad is not None}


PARTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "rank": st.sampled_from([1, 4, 8]),
        "linears": st.lists(st.sampled_from(sorted(ALL_PARTS)), min_size=1, unique=True),
        "layers": st.integers(1, 2),
        "loss": st.sampled_from(sorted(LOSSES)),
        "pairs": st.integers(1, 2),
        "longest": st.sampled_from([5, 40, 90]),
        "dropout": st.sampled_from([0.0, 0.3]),
        "noise": st.sampled_from([0.0, 5.0]),
        "checkpointing": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    several=st.lists(PARTS, min_size=2, max_size=4),
    cuts=st.lists(st.sampled_from([1, 3, 64, 100, 10**6]), min_size=1, max_size=3),
)
def test_losses_and_gradients_equal_those_alone(
    decoder: Decoder, several: list[dict[str, Any]], cuts: list[int]
) -> None:
    parts = [Part(decoder, **options) for options in several]
    alone = []
    for part in parts:
        micro = part.step()
        drive(micro.forward_backward(part.weight), [10**6])
        alone.append((micro.score, part.gradients()))
    micros = [part.step() for part in parts]
    beside = [(micro, part.weight) for micro, part in zip(micros[1:], parts[1:], strict=True)]
    drive(micros[0].forward_backward(parts[0].weight, beside), cuts)
    for micro, part, (score, gradients) in zip(micros, parts, alone, strict=True):
        assert micro.score.mean == pytest.approx(score.mean, rel=1e-5, abs=1e-6)
        assert (micro.score.units, micro.score.tokens) == (score.units, score.tokens)
        assert micro.score.metrics == pytest.approx(score.metrics, rel=1e-4, abs=1e-5)
        found = part.gradients()
        assert found.keys() == gradients.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, gradients[name], atol=1e-5, rtol=1e-4)


def pair(decoder: Decoder, **second: Any) -> list[Part]:
    basic: dict[str, Any] = {"rank": 4, "linears": ["qkv", "down"], "layers": 2, "loss": "supervised", "pairs": 1}
    first = Part(decoder, seed=1, longest=30, **basic)
    return [first, Part(decoder, seed=2, longest=30, **{**basic, **second})]


def offered(parts: Sequence[Part]) -> list[OfferedMicro]:
    made = [OfferedMicro(part.step(), part.weight, sum(map(len, part.data))) for part in parts]
    made[0].begin(made[1:])
    return made


def test_what_is_not_a_number_stays_with_its_job(decoder: Decoder) -> None:
    parts = pair(decoder)
    drive(parts[0].step().forward_backward(parts[0].weight), [10**6])
    expected = parts[0].gradients()
    with torch.no_grad():
        next(iter(parts[1].lora.parameters()))[1].fill_(float("nan"))
    first, second = offered(parts)
    drive(first.slices(), [64])
    assert second.done
    assert not second.broken
    assert second.micro.score.mean != second.micro.score.mean
    assert first.micro.score.mean == first.micro.score.mean
    for name, grad in parts[0].gradients().items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


class Broken:
    """A loss that raises."""

    group_size, needs_reference = 1, False

    def slopes(self, batch: Any) -> None:
        raise ArithmeticError("no loss")


def test_an_error_ends_the_pass_for_all_of_its_jobs(decoder: Decoder) -> None:
    parts = pair(decoder)
    first, second = offered(parts)
    second.micro._loss = Broken()  # type: ignore[attr-defined]
    with pytest.raises(BrokenPass):
        drive(first.slices(), [64])
    with pytest.raises(BrokenPass):
        drive(second.slices(), [64])


def test_a_leader_that_goes_leaves_no_one_waiting(decoder: Decoder) -> None:
    first, second = offered(pair(decoder))
    slices, waiting = first.slices(), second.slices()
    next(slices)
    next(waiting)
    assert second.waits
    slices.close()
    assert not second.waits
    with pytest.raises(BrokenPass):
        next(waiting)


def test_an_adapter_that_does_more_than_add_runs_alone(decoder: Decoder) -> None:
    plain, subtracted = pair(decoder, initial="gaussian", start="subtracted")
    assert plain.step().joins
    assert not subtracted.step().joins
