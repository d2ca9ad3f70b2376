"""First weights that are made from the base's, against PEFT, which takes them out of a copy of the base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.training import TrainingOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.export.merge import delta
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.peft import read_adapter
from runtime.engine.first_weights import (
    BaseWeights,
    Stopped,
    find_origin,
    keep_origin,
    kept_origin,
    made_parameters,
    origin_parameters,
    pinned_origin,
)
from runtime.errors import InvalidRequest
from runtime.model.decoder import Decoder
from runtime.model.families.gpt2 import GPT2
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from runtime.trainer.course import Restored, RunProgress
from runtime.trainer.data.example import collate
from runtime.trainer.lora import TrainableLora, layers_of, parameters_of
from runtime.trainer.plan.plan import AdapterOrigin
from runtime.trainer.sliced_run import RunSpec
from runtime.trainer.step import MicroStep
from settings.schema import ModelSettings
from tests.adapter_files import make_adapter, peft_logits
from tests.parity.adapted import our_logits
from tests.parity.families import CASES, make_model
from tests.parity.gradients import drive as drive_slices
from tests.parity.packing import load as load_any
from tests.parity.peft_training import DATA, IDS, logits, peft_of, spec_of, trained_by_peft, trained_by_us
from tests.trainer.tiny_training import all_targets, run_spec
from tests.trainer.tiny_training import load_decoder as load_reference

MADE = ["pissa", "pissa_niter_8", "olora"]


def weights_of(path: Path, decoder: Decoder) -> BaseWeights:
    checkpoint = open_checkpoint(str(path))
    return BaseWeights(checkpoint, LoraBase.of(decoder, Llama, "tiny"), decoder)


def begun(path: Path, decoder: Decoder, spec: RunSpec) -> Restored:
    parameters = made_parameters(spec.recipe, spec.shape, spec.targets, weights_of(path, decoder))
    assert parameters is not None
    return Restored(RunProgress(), parameters, {}, None)


PATTERNS = {"lora_rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "lora_alpha_pattern": {"k_proj": 5.0}}


@pytest.mark.parametrize("patterns", [{}, PATTERNS])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_training_equals_peft_s_and_the_adapter_is_for_the_base_as_it_is(
    kind: str, rslora: bool, patterns: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """PEFT trains beside a base without the first product; ours is published with twice the ranks."""
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, kind, peft_use_rslora=rslora, **patterns)
    losses, adapter = trained_by_us(tiny_model, decoder, spec, tmp_path / "run", begun(tiny_model, decoder, spec))
    shape = spec.shape
    theirs = {"rank_pattern": shape.rank_pattern, "alpha_pattern": shape.alpha_pattern}
    oracle = peft_of(tiny_model, kind, use_rslora=rslora, **theirs)
    assert losses == pytest.approx(trained_by_peft(oracle, spec.recipe.learning_rate), abs=1e-4)
    expected = logits(oracle)
    base = LoraBase.of(decoder, Llama, "tiny")
    assert (our_logits(decoder, base, adapter, IDS) - expected).abs().max() < 1e-4
    assert (peft_logits(tiny_model, adapter, IDS.tolist()) - expected).abs().max() < 1e-4
    assert read_adapter(adapter, base, max_rank=8).rank == 8
    assert (losses[0] - losses[-1]) != 0


@pytest.mark.parametrize("kind", MADE)
def test_it_begins_with_the_base_alone(kind: str, tiny_model: Path) -> None:
    """And with the gradients that the first weights have, which are no zeros."""
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, kind)
    start = begun(tiny_model, decoder, spec)
    lora = TrainableLora(decoder, spec.targets, spec.shape, seed=0, initial=kind, start=spec.start)
    lora.restore(start.parameters)
    batch = collate(DATA[:2], decoder.device)
    plain = MicroStep(decoder, TrainingOps(), TrainableLora(decoder, {}, spec.shape, seed=0), batch)
    drive_slices(plain.evaluate(), "whole")
    micro = MicroStep(decoder, TrainingOps(), lora, batch)
    drive_slices(micro.forward_backward(1.0), "odd")
    assert micro.score.loss == pytest.approx(plain.score.loss, rel=1e-5)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in lora.parameters())
    captured = lora.capture()
    for parts in layers_of(captured, spec.targets, spec.shape, subtracted=True).values():
        assert all(part.a.shape[0] == 8 and delta(part).abs().max() < 1e-5 for part in parts)
    again = TrainableLora(decoder, spec.targets, spec.shape, seed=0, initial=kind, start=spec.start)
    with torch.no_grad():
        next(p for _, p in lora.parameters()).add_(1.0)
    again.restore(lora.capture())  # of a run that goes on from a checkpoint: the start is not what is restored
    assert all(torch.equal(again.capture()[name], tensor) for name, tensor in lora.capture().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_takes_the_largest_singular_values(family: str, tmp_path: Path) -> None:
    """Of GPT-2 too, whose files have its linears transposed."""
    model = make_model(tmp_path, *CASES[family])
    decoder, architecture = load_any(tmp_path)
    base = LoraBase.of(decoder, architecture, "tiny")
    assert architecture in (Llama, GPT2)
    linear, part = ("qkv", "q") if family == "llama" else ("qkv", "")
    targets = {(1, linear): (part,)}
    spec = run_spec(decoder, targets=targets, peft_init_lora_weights="pissa", lora_alpha=12.0)
    weights = BaseWeights(open_checkpoint_of(tmp_path, decoder), base, decoder)
    found = made_parameters(spec.recipe, spec.shape, targets, weights)
    assert found is not None
    name = f"{base.module(1, linear, part)}.weight"
    whole = model.state_dict()[name].float()
    whole = whole.t() if family == "gpt2" else whole
    left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
    expected = (left[:, :4] * sizes[:4]) @ right[:4]
    ((made,),) = layers_of(found, targets, spec.shape).values()
    assert made.scale == 3.0
    torch.testing.assert_close(delta(made), expected, atol=1e-5, rtol=1e-4)


def open_checkpoint_of(path: Path, decoder: Decoder) -> Any:
    """The files of a model without a tokenizer, as far as first weights need them."""
    import json

    from runtime.checkpoints.safetensors_files import find_weights

    class Files:
        config = json.loads((path / "config.json").read_text())

        def tensors(self) -> Any:
            return find_weights(path).tensors()

    return Files()


@pytest.mark.parametrize("quantization", ["int4", "nf4", "int8", "bfloat16"])
def test_loftq_begins_with_what_rounding_took(quantization: str, tiny_model: Path) -> None:
    """The served weights and the first product are nearer to the files' weights, by the best product of that rank."""
    settings = ModelSettings(model=str(tiny_model), quantization=quantization)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(str(tiny_model))
    decoder = load_decoder(checkpoint, settings)
    spec = run_spec(decoder, peft_init_lora_weights="loftq", lora_alpha=12.0, targets={(0, "gate_up"): ("gate", "up")})
    found = made_parameters(spec.recipe, spec.shape, spec.targets, weights_of(tiny_model, decoder))
    assert found is not None
    assert spec.start == "none"
    ((gate, up),) = layers_of(found, spec.targets, spec.shape).values()
    stored = dict(checkpoint.tensors())
    for part, start in ((gate, 0), (up, 128)):
        lost = stored[f"model.layers.0.mlp.{part.part}_proj.weight"].float() - decoder.layers[0].linears[
            "gate_up"
        ].weight.rows(start, start + 128)
        _, sizes, _ = torch.linalg.svd(lost)
        assert (lost - delta(part)).norm() == pytest.approx(sizes[4:].norm().item(), rel=1e-3)
        assert (lost - delta(part)).norm() < lost.norm()


def test_loftq_on_a_base_in_floats_has_nothing_to_begin_with(tiny_model: Path, tmp_path: Path) -> None:
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, "loftq")
    assert made_parameters(spec.recipe, spec.shape, spec.targets, weights_of(tiny_model, decoder)) is None
    plain = spec_of(decoder, "pissa")
    as_usual = run_spec(decoder)
    for one in (spec, as_usual):
        lora = TrainableLora(decoder, one.targets, one.shape, seed=3, initial=one.recipe.first_weights)
        assert all(not tensor.any() for name, tensor in lora.parameters() if ".b." in name)
    assert plain.start == "subtracted"


def test_the_order_of_reading_and_the_number_of_runs_change_nothing(tiny_model: Path) -> None:
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, "pissa_niter_2")
    one, other = (begun(tiny_model, decoder, spec).parameters for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    layers = layers_of(one, spec.targets, spec.shape)
    assert all(torch.equal(tensor, one[name]) for name, tensor in parameters_of(layers).items())


def test_a_job_keeps_what_it_goes_on_from(tiny_model: Path, tmp_path: Path) -> None:
    """In the next process too, where the name may mean another version, or none."""
    base = LoraBase.of(load_reference(tiny_model), Llama, "tiny")
    source = make_adapter(tiny_model, tmp_path / "source", use_dora=True)
    expected = origin_parameters(AdapterOrigin(source, "newt@1"), base, max_rank=8)
    assert kept_origin(tmp_path / "origin") is None
    keep_origin(AdapterOrigin(source, "newt@1"), tmp_path / "origin", base, max_rank=8)
    shutil.rmtree(source)
    kept = kept_origin(tmp_path / "origin")
    assert kept == AdapterOrigin(tmp_path / "origin", "newt@1")
    found = origin_parameters(kept, base, max_rank=8)
    assert any(".m." in name for name in found)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InvalidRequest, match=r"lora_model_dir \(newt@2\): The adapter has no adapter_config.json"):
        keep_origin(AdapterOrigin(source, "newt@2"), tmp_path / "other", base, max_rank=8)
    assert not (tmp_path / "other").exists()


class NoLibrary:
    def find(self, name: str) -> None:
        return None

    def list(self) -> list[Any]:
        return []


def test_what_is_put_in_a_folder_s_place_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    """Under a data root, by another user of it: between the check and the reading, or while it is read."""
    base = LoraBase.of(load_reference(tiny_model), Llama, "tiny")
    root, secret = tmp_path / "root", make_adapter(tiny_model, tmp_path / "secret", r=2)
    root.mkdir()
    source = make_adapter(tiny_model, root / "a")
    origin = find_origin("a", NoLibrary(), [root], base)  # type: ignore[arg-type]
    with pinned_origin(origin) as there:
        source.rename(root / "moved")
        source.symlink_to(secret)
        kept = keep_origin(there, tmp_path / "origin", base, max_rank=8)
    assert (kept.directory / "adapter_model.safetensors").read_bytes() == (
        root / "moved" / "adapter_model.safetensors"
    ).read_bytes()
    refused = pytest.raises(InvalidRequest, match=r"lora_model_dir \(a\): the folder cannot be opened")
    with refused, pinned_origin(origin):
        raise AssertionError("it was opened")


def test_a_run_that_is_cancelled_stops_making_them(tiny_model: Path) -> None:
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, "pissa")
    with pytest.raises(Stopped):
        made_parameters(spec.recipe, spec.shape, spec.targets, weights_of(tiny_model, decoder), lambda: True)


def test_a_base_that_is_stored_in_integers(tiny_model: Path) -> None:
    from kernels import quantise_nf4

    decoder = load_reference(tiny_model)
    weights = weights_of(tiny_model, decoder)

    class Stored:
        config = weights.checkpoint.config

        def tensors(self) -> Any:
            return ((n, quantise_nf4(t) if t.ndim == 2 else t) for n, t in weights.checkpoint.tensors())

    stored: Any = Stored()
    loftq, pissa = spec_of(decoder, "loftq"), spec_of(decoder, "pissa")
    with pytest.raises(InvalidRequest, match=r"loftq, but the base's own files hold .* in integers"):
        made_parameters(loftq.recipe, loftq.shape, loftq.targets, weights._replace(checkpoint=stored))
    assert made_parameters(pissa.recipe, pissa.shape, pissa.targets, weights._replace(checkpoint=stored))


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_drawn_weights_are_peft_s_kind(kind: str, tiny_model: Path) -> None:
    """The same moments as PEFT's, and nothing is added at first."""
    decoder = load_reference(tiny_model)
    spec = spec_of(decoder, kind, lora_r=8)
    lora = TrainableLora(decoder, all_targets(decoder), spec.shape, seed=1, initial=kind)
    oracle = peft_of(tiny_model, kind, r=8)
    ours = torch.cat([tensor.flatten() for name, tensor in lora.parameters() if name.endswith(".a")])
    theirs = torch.cat([p.flatten() for name, p in oracle.named_parameters() if "lora_A" in name])
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert abs(ours.mean().item()) < 0.01
    for parts in lora.layers_of(lora.capture()).values():
        assert all(delta(part).abs().max() < 1e-5 for part in parts)
    assert any(".b." in name and tensor.any() for name, tensor in lora.parameters()) == (kind == "orthogonal")
