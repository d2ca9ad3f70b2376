"""Which linears are adapted, against what PEFT adapts."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.model.families.llama import Llama
from runtime.trainer.plan.served_model import ModelShape, TargetKey, resolve_targets, shape_of
from runtime.trainer.recipe import Document, recipe_from


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def shape(model: Any) -> ModelShape:
    return shape_of(Llama.spec(model.config.to_dict()), Llama.LORA_TARGETS, bytes_per_value=4)


def resolve(shape: ModelShape, **keys: Any) -> list[TargetKey]:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}]}
    return resolve_targets(recipe_from(Document({**basic, **keys}), max_lora_rank=64), shape)


def theirs(model: Any, modules: Any) -> set[str]:
    """Full names of the linears that PEFT adapts."""
    import copy

    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
    suffix = ".lora_A.default"
    return {
        name.removeprefix("base_model.model.").removesuffix(suffix)
        for name, _ in wrapped.named_modules()
        if name.endswith(suffix)
    }


@pytest.mark.parametrize(
    "modules",
    [
        ["q_proj", "v_proj"],
        ["self_attn.o_proj"],
        ["model.layers.1.mlp.down_proj", "k_proj"],
        "all-linear",
        r".*\.(gate|up)_proj",
        r"model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
        r"model\.layers\.0\..*q_proj",
    ],
)
def test_as_peft(model: Any, shape: ModelShape, modules: Any) -> None:
    ours = resolve(shape, lora_target_modules=modules)
    assert {f"model.layers.{layer}.{name}" for layer, name in ours} == theirs(model, modules)
    assert len(set(ours)) == len(ours)


def test_every_linear_by_default(shape: ModelShape) -> None:
    every = resolve(shape, lora_target_linear=True)
    assert len(every) == 2 * 7
    assert resolve(shape) == every == resolve(shape, lora_target_linear=True, lora_target_modules=["q_proj"])


def test_sizes(model: Any, shape: ModelShape) -> None:
    layer = model.model.layers[0]
    for name, (inside, outside) in shape.linears.items():
        assert layer.get_submodule(name).weight.shape == (outside, inside)


@pytest.mark.parametrize("modules", [["q_proj", "in_proj"], ["lm_head"], ["proj"], "q_proj", "(experts|router).*"])
def test_what_is_absent_is_refused_with_what_there_is(shape: ModelShape, modules: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=r"q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ) as caught:
        resolve(shape, lora_target_modules=modules)
    assert caught.value.param == "lora_target_modules"


def test_an_expression_that_takes_forever(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.trainer.plan.served_model._PATIENCE", 0.05)
    with pytest.raises(InvalidRequest, match=r"no linear|takes over"):
        resolve(shape, lora_target_modules=r"((([\w.]+)+)+)+!(?<=a)")
