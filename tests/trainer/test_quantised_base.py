"""Training on a base in integers: losses and adapters are those of the float model with the same values."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import QUANTISERS, Ops, QuantisedWeight
from kernels import load as load_ops
from kernels.cpu import CpuOps
from kernels.reference import ReferenceOps
from kernels.training import TrainingOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.events import RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import TrainableLora
from runtime.trainer.run import TrainingRun
from runtime.trainer.step import MicroStep
from settings.schema import ModelSettings
from tests.trainer.tiny_training import drive, make_run, run_spec

BACKENDS: list[type[Ops]] = [ReferenceOps] if CpuOps.unavailable() else [ReferenceOps, CpuOps]


def load(path: Path, quantization: str, kernels: str) -> Decoder:
    settings = ModelSettings(model=str(path), quantization=quantization, kernels=kernels)  # type: ignore[arg-type]
    return load_decoder(open_checkpoint(str(path)), settings)


def trained(decoder: Decoder, **keys: Any) -> tuple[list[float], torch.Tensor]:
    """The losses of two steps, and the adapter after them."""
    events: list[RunEvent] = []
    run: TrainingRun = make_run(decoder, run_spec(decoder, total_steps=2, warmup_steps=0, **keys), events)
    drive(run)
    weights = torch.cat([tensor.flatten() for tensor in run._lora.capture().values()])
    return [event.loss for event in events if isinstance(event, StepEvent)], weights


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_trains_as_the_dequantised_model_does(tiny_model: Path, quantization: str, backend: str, dora: bool) -> None:
    ours, floats = load(tiny_model, quantization, backend), load(tiny_model, "none", backend)
    for name, parameter in ours.parameters().items():
        if parameter.quantised is not None:
            floats.parameters()[name].data.copy_(parameter.quantised.dequantise())
    found, expected = (trained(decoder, peft_use_dora=dora, lora_dropout=0.1) for decoder in (ours, floats))
    assert found[0] == pytest.approx(expected[0], abs=1e-4)
    assert torch.allclose(found[1], expected[1], atol=1e-4)
    assert all(isinstance(linear.weight.value, QuantisedWeight) for linear in ours.layers[0].linears.values())


def test_a_whole_run_ends_in_an_adapter(tiny_model: Path) -> None:
    decoder = load(tiny_model, "int4", "auto")
    events: list[RunEvent] = []
    drive(make_run(decoder, run_spec(decoder), events))
    assert type(events[-1]).__name__ == "FinishedEvent"


@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_is_made_float_in_a_slice_of_its_own(
    dora: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all pieces of a stage, forwards and backwards; the last stage goes backwards with the same one. With
    dropout, magnitudes scale a product of their own, for which it is not made again."""
    decoder = load(tiny_model, "int8", "auto")
    kind = type(decoder.layers[0].linears["qkv"].weight.value)
    assert issubclass(kind, QuantisedWeight)
    made, factor = list[QuantisedWeight](), kind.factor

    def counted(self: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
        made.append(self)
        return factor(self, dtype)

    examples = [Example([7 + index % 50 for index in range(90)], [False] + [True] * 89)]
    lora = TrainableLora(decoder, run_spec(decoder).targets, LoraShape(rank=4, alpha=8, dora=dora), seed=0)
    batch = collate(examples, decoder.device)
    micro = MicroStep(decoder, TrainingOps(), lora, batch, checkpointing=False, dropout=0.1)
    monkeypatch.setattr(kind, "factor", counted)
    slices, kinds = micro.forward_backward(1.0), list[str]()
    with suppress(StopIteration):
        wanted = next(slices)
        while True:
            kinds.append(wanted.kind)
            wanted = slices.send(min(wanted.amount, 64))  # so there are two pieces of each stage
    factors = [kind for kind in kinds if kind.startswith("factor/")]
    assert len(factors) == len(decoder.layers) * 4 * 2 - 1
    linears = {linear.weight.value for layer in decoder.layers for linear in layer.linears.values()}
    assert len([one for one in made if one in linears]) == len(factors)
    assert kinds.count("expand_kept") == 2 * len(decoder.layers)
    assert micro.score.tokens == 89


@pytest.mark.parametrize("quantization", ["int4", "nf4"])
def test_a_base_of_four_bits_takes_less_than_a_third_of_the_floats(quantization: str) -> None:
    """The tensors' bytes of a layer of SmolLM2 and of the layer's share of the embedding."""
    kinds, ops = QUANTISERS[quantization], load_ops("auto")
    shapes = [(960, 576), (576, 576), (576, 1536)]
    weights = [kinds.layers(torch.randn(shape)) for shape in shapes]
    weights += [kinds.expanding(torch.randn(3072, 576)), kinds.vocabulary(torch.randn(49152 // 30, 576))]
    held = sum(ops.prepare(weight).num_bytes for weight in weights)
    assert held < 0.3 * 4 * sum(weight.shape.numel() for weight in weights)


@pytest.mark.parametrize("kernels", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("rows", [slice(0, 100), slice(16, 48), slice(7, 64), slice(33, 34)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "bfloat16"])
def test_rows_of_a_factor_are_those_of_the_whole(kind: str, rows: slice, kernels: str) -> None:
    weight = load_ops(kernels).prepare(QUANTISERS[kind].layers(torch.randn(100, 96)))
    x = torch.randn(5, 96)
    assert torch.equal(weight.factor_rows(rows), weight.factor(torch.float32)[rows])
    products = weight.turned(x) @ weight.factor_rows(rows).t()
    torch.testing.assert_close(products, x @ weight.dequantise()[rows].t(), rtol=1e-4, atol=1e-4)
