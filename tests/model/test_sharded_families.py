"""Every family on 2 and on 4 ranks against one: the same logits, and the same gradients of an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Quantiser
from kernels.quantised import QuantisedWeight
from kernels.training import TrainingOps
from runtime.checkpoints.safetensors_files import find_weights
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.families.family import Family
from runtime.model.group import SOLO, Group
from runtime.model.lora import LoraShape
from runtime.model.lora_base import LoraBase
from runtime.trainer.data.example import collate
from runtime.trainer.lora import TrainableLora
from runtime.trainer.step import MicroStep
from tests.model.rank_threads import in_ranks
from tests.parity.families import CASES, make_model
from tests.parity.gradients import data

NAMES = [
    "llama",
    "mistral with a window",
    "ministral",
    "mixtral",
    "qwen2 tied",
    "qwen2 moe, options",
    "qwen3 with biases and windows",
    "qwen3 moe",
    "phi4 mini",
    "gemma2",
    "gemma3",
    "gpt2, options",
    "gpt-neox",
    "olmo2",
    "granite",
    "stablelm, options",
    "falcon 7b",
    "falcon 40b",
    "smollm3",
]
IDS = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(3))
LENGTHS = [25, 15]


def load(
    path: Path, group: Group, *, quantization: str = "none", kept: Quantiser | None = None, ops: str = "reference"
) -> tuple[Decoder, type[Family]]:
    """`kept`: the checkpoint's matrices come in integers."""
    config = json.loads((path / "config.json").read_text())
    family = find_model(config)
    spec = family.spec(config)
    cpu = torch.device("cpu")
    decoder = Decoder(spec, kernels.load(ops), max_len=128, dtype=torch.float32, device=cpu, group=group)
    tensors = family.weights(find_weights(path).tensors(), spec)
    if kept is not None:
        tensors = ((n, part, kept(x) if isinstance(x, Tensor) and x.ndim == 2 else x) for n, part, x in tensors)
    decoder.load(tensors, quantization=quantization)
    return decoder, family


def once(quantiser: Quantiser) -> Quantiser:
    """`quantiser` with a cache: int4 searches for its scales, and seven ranks load the same weights."""
    found: dict[tuple[torch.Size, bytes], QuantisedWeight] = {}

    def quantise(matrix: Tensor) -> QuantisedWeight:
        key = matrix.shape, matrix.float().numpy().tobytes()
        if key not in found:
            found[key] = quantiser(matrix)
        return found[key]

    return quantise


def logits(decoder: Decoder) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.inference_mode():
        attention = PackedAttention(decoder.ops, LENGTHS, decoder.spec)
        return decoder.logits(decoder.forward(IDS, positions, attention))


def gradients(decoder: Decoder, family: type[Family], *, dora: bool = False) -> dict[str, Tensor]:
    """Of all factors of an adapter of everything, whole, and the loss under the name of nothing."""
    targets: dict[tuple[int, str], list[str]] = {}
    for layer in range(decoder.spec.num_layers):
        for linear, part in family.LORA_TARGETS.values():
            targets.setdefault((layer, linear), []).append(part)
    lora = TrainableLora(decoder, targets, LoraShape(rank=3, alpha=6, dora=dora), seed=3)
    whole = lora.capture()
    lora.restore({name: torch.randn(x.shape, generator=_seeded(name)) * 0.2 for name, x in whole.items()})
    micro = MicroStep(decoder, TrainingOps(), lora, collate(data(), decoder.device), dropout=0.1, checkpointing=True)
    slices = micro.forward_backward(1 / 10)
    wanted = next(slices)
    while True:
        try:
            wanted = slices.send(wanted.amount)
        except StopIteration:
            break
    grads = {name: parameter.grad for name, parameter in lora.parameters() if parameter.grad is not None}
    lora.shards.complete(grads)
    norm = lora.shards.squares(grads) ** 0.5
    return {**lora.shards.gather(grads), "": torch.tensor([micro.score.loss, norm, float(micro.score.correct)])}


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_one_does(name: str, tmp_path: Path) -> None:
    make_model(tmp_path, *CASES[name])

    def work(group: Group) -> tuple[Tensor, dict[str, Tensor], str]:
        decoder, family = load(tmp_path, group)
        return logits(decoder), gradients(decoder, family), LoraBase.of(decoder, family, "").fingerprint

    ((expected, expected_grads, fingerprint),) = in_ranks(1, work)
    for size in (2, 4):  # with 4 there are fewer key/value heads than ranks
        for found, grads, mark in in_ranks(size, work):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
            assert grads.keys() == expected_grads.keys()
            for key, grad in grads.items():
                error = (grad - expected_grads[key]).abs().max() / expected_grads[key].abs().max().clamp(min=1)
                assert error < 1e-4, key
            assert mark == fingerprint


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", "none"), ("llama", "int4"), ("gpt2, options", "none"), ("phi3", "none"), ("gpt-neox", "none")],
)
def test_ranks_train_magnitudes_as_one_does(name: str, quantization: str, tmp_path: Path) -> None:
    """int4: each rank has whole groups."""
    model_type, options = CASES[name]
    make_model(tmp_path, model_type, {**options, "hidden_size": 256, "intermediate_size": 256})

    def work(group: Group) -> dict[str, Tensor]:
        return gradients(*load(tmp_path, group, quantization=quantization), dora=True)

    ((expected),) = in_ranks(1, work)
    assert any(".m." in key for key in expected)
    for size in (2, 4):
        for found in in_ranks(size, work):
            assert found.keys() == expected.keys()
            for key, grad in found.items():
                error = (grad - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1)
                assert error < 1e-4, key


@pytest.mark.parametrize(("name", "quantization"), [("llama", "int8"), ("phi3", "int8"), ("llama", "int4")])
def test_ranks_train_on_integers_as_one_does(name: str, quantization: str, tmp_path: Path) -> None:
    """Without gradients too, where serving quantises activations: each rank has whole groups."""
    model_type, options = CASES[name]
    make_model(tmp_path, model_type, {**options, "hidden_size": 256, "intermediate_size": 256})
    (expected,) = in_ranks(1, lambda group: gradients(*load(tmp_path, group, quantization=quantization)))
    for size in (2, 4):
        for found in in_ranks(size, lambda group: gradients(*load(tmp_path, group, quantization=quantization))):
            assert found.keys() == expected.keys()
            for key, grad in found.items():
                error = (grad - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1)
                assert error < 2e-4, key


def test_every_family_is_tried() -> None:
    assert {CASES[name][0] for name in NAMES} == {model_type for model_type, _ in CASES.values()}


@pytest.mark.parametrize("ops", [name for name, reason in kernels.available().items() if reason is None])
@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "gpt2", "olmo2"])
def test_int8_ranks_compute_the_very_bits_of_one(name: str, ops: str, tmp_path: Path) -> None:
    """Each of four has whole blocks of inputs. A norm over heads of several ranks is summed in another order,
    so OLMo 2's are only close."""
    model_type, options = CASES[name]
    make_model(tmp_path, model_type, {**options, "hidden_size": 256, "intermediate_size": 256})
    (expected,) = in_ranks(1, lambda group: logits(load(tmp_path, group, quantization="int8", ops=ops)[0]))
    for size in (2, 4):
        for found in in_ranks(size, lambda group: logits(load(tmp_path, group, quantization="int8", ops=ops)[0])):
            if name == "olmo2":
                assert (found - expected).std() < 0.05 * expected.std()
            else:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("ops", [name for name, reason in kernels.available().items() if reason is None])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("quantization", ["int4", "nf4", "bfloat16"])
def test_ranks_share_weights_with_a_scale_a_group(quantization: str, kept: bool, ops: str, tmp_path: Path) -> None:
    """Each quantises activations by its own slice of them, so the last bits differ. All have whole groups here."""
    make_model(tmp_path, "llama", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    quantiser = kernels.QUANTISERS[quantization].layers
    form: dict[str, Any] = {"kept": once(quantiser)} if kept else {"quantization": quantization}
    plain = logits(load(tmp_path, SOLO)[0])
    (expected,) = in_ranks(1, lambda group: logits(load(tmp_path, group, ops=ops, **form)[0]))
    for size in (2, 4):
        for found in in_ranks(size, lambda group: logits(load(tmp_path, group, ops=ops, **form)[0])):
            assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path, *CASES["llama"])
    with pytest.raises(ValueError, match=r"4 attention heads over 2 key/value heads .* 3 ranks; parallel.tp can be"):
        in_ranks(3, lambda group: load(tmp_path, group))
    make_model(tmp_path / "odd", "llama", {"intermediate_size": 81})
    with pytest.raises(ValueError, match="intermediate_size is 81, which cannot be shared evenly by 2 ranks"):
        in_ranks(2, lambda group: load(tmp_path / "odd", group))
