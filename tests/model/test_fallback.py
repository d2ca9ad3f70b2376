"""What cannot be served through transformers is refused with its reason; what can be is trained and held in int8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from runtime.checkpoints.peft import read_adapter, write_adapter
from runtime.checkpoints.verification import ours
from runtime.engine.assembly import assemble
from runtime.events import FinishedEvent, RunEvent, StepEvent
from runtime.model.config import ModelLoadError
from runtime.model.fallback import FallbackDecoder
from runtime.model.fallback.linears import attending
from runtime.trainer.data.files import DataFiles
from runtime.trainer.plan.plan import feed, prepare
from runtime.trainer.plan.served_model import by_linear, shape_of_base
from runtime.trainer.recipe import Document, recipe_from
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import RunSpec
from settings.load import load as load_settings
from tests.parity.fallbacks import make_fallback
from tests.trainer.tiny_training import drive, examples, make_run, run_spec, write_nothing

RECIPES = Path(__file__).parent.parent.parent / "settings" / "recipes"
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def settings(path: Path, **flags: object) -> Any:
    return load_settings(env={}, flags={"model": str(path), "num_blocks": 8, **flags}).settings


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("mamba", {"num_hidden_layers": 1}, "keeps a state that is not attention"),
        ("gptj", {}, "does not use its attention interface|fails on a few tokens"),  # by the version of transformers
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "its attention has sinks"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "not every layer of it calls"),
        ("phi", {"rope_parameters": DYNAMIC}, "set max_model_len to at most 256"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, model_type: str, options: dict[str, Any], message: str
) -> None:
    make_fallback(tmp_path, model_type, **options)
    limit = {"max_model_len": 512} if "rope_parameters" in options else {}
    with pytest.raises(ModelLoadError, match=message):
        assemble(settings(tmp_path, **limit))


def test_other_names_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NewtForCausalLM"]}))
    with pytest.raises(ModelLoadError, match=r"neither one of ours .* nor a causal language model of transformers"):
        assemble(settings(tmp_path))


def test_weights_that_lack_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_fallback(tmp_path, "phi")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights, the first: model\.layers\.2\.mlp\.fc1\.weight"):
        assemble(settings(tmp_path))


def test_the_log_says_so(tmp_path: Path) -> None:
    make_fallback(tmp_path, "phi")
    with capture_logs() as logs:
        assemble(settings(tmp_path))
    (line,) = [one for one in logs if one["event"] == "no_native_model"]
    assert (line["architecture"], line["served_through"]) == ("PhiForCausalLM", "transformers")


def test_attention_is_set_for_one_call_alone(tmp_path: Path) -> None:
    def attend(*args: Any) -> torch.Tensor:
        raise AssertionError

    with attending(attend), pytest.raises(RuntimeError, match="set twice"), attending(attend):
        pass
    with attending(attend):  # the first one was reset
        pass


def test_int8_holds_the_layers_in_a_quarter_and_answers_nearly_the_same(tmp_path: Path) -> None:
    make_fallback(tmp_path, "cohere2")
    full, decoder = (assemble(settings(tmp_path, quantization=kind)).decoder for kind in ("none", "int8"))
    assert isinstance(full, FallbackDecoder)
    assert isinstance(decoder, FallbackDecoder)
    ids = list(range(20, 60))
    expected, found = (ours(model)(ids) for model in (full, decoder))
    assert (found - expected).std() < 0.1 * expected.std()
    assert all(one.weight.quantised is not None for one in decoder.layers[0].linears.values())
    assert sum(p.numel() for p in decoder._modules[0].parameters()) == 64  # the norm alone is still there


def test_a_run_learns_and_its_adapter_can_be_published(tmp_path: Path) -> None:
    make_fallback(tmp_path / "model", "cohere2")
    assembled = assemble(settings(tmp_path / "model"))
    decoder, base = assembled.decoder, assembled.lora_base
    places = {(layer, name): ("",) for layer in range(4) for name in base.targets}
    spec = run_spec(decoder, targets=places)  # type: ignore[arg-type]
    before = {name: weight.data.clone() for name, weight in decoder.parameters().items()}
    events: list[RunEvent] = []
    run = make_run(decoder, spec, events, data=examples(4))  # type: ignore[arg-type]
    drive(run, 0.01)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert isinstance(events[-1], FinishedEvent)
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], weight.data) for name, weight in decoder.parameters().items())
    layers = run._lora.layers_of(run.take_snapshot(6).parameters)
    write_adapter(tmp_path / "adapter", layers, spec.shape, base)
    read = read_adapter(tmp_path / "adapter", base, max_rank=8)
    assert read.layers.keys() == layers.keys()
    for place, parts in layers.items():
        assert torch.equal(read.layers[place][0].b, parts[0].b)


def test_a_recipe_becomes_a_run(tmp_path: Path) -> None:
    """The names in a recipe are those of transformers' modules, and a plan's numbers are the run's."""
    make_fallback(tmp_path, "phi")
    assembled = assemble(settings(tmp_path))
    base, decoder = assembled.lora_base, assembled.decoder
    keys = {"adapter": "lora", "learning_rate": 5e-3, "datasets": [{"path": "data/newts.jsonl"}], "lora_r": 4}
    plan = prepare(
        recipe_from(
            Document({**keys, "lora_target_modules": ["fc1", "q_proj"], "sequence_len": 256}), max_lora_rank=64
        ),
        assembled.engine.tokenizer,
        DataFiles(roots=[RECIPES]),
        model_names=("tiny",),
        max_len=decoder.max_len,
        shape=shape_of_base(decoder.spec, base, bytes_per_value=4),
    )
    spec = RunSpec(recipe=plan.recipe, schedule=plan.schedule, targets=by_linear(plan.targets, base.places))
    assert spec.targets == {(layer, name): [""] for layer in range(4) for name in ("mlp.fc1", "self_attn.q_proj")}
    run = TrainingRun(decoder, spec, feed(plan).epoch, [], lambda event: None, write_nothing)
    assert sum(tensor.numel() for tensor in run._lora.capture().values()) == plan.estimate.parameters
