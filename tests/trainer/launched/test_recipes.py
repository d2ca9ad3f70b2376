"""Which recipes ask for devices of their own, what their keys come to, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.trainer.recipe.launch import fsdp_options, launch_of
from tests.trainer.launched.recipes import make, problems


@pytest.mark.parametrize(
    ("keys", "method", "full"),
    [
        ({}, "ddp", True),
        ({"adapter": "lora", "ddp": True}, "ddp", False),
        ({"adapter": "lora", "devices": 1}, "ddp", False),
        ({"adapter": "qlora", "fsdp": ["full_shard", "auto_wrap"]}, "fsdp", False),
        ({"fsdp_config": {"fsdp_offload_params": True}, "fsdp_version": 2}, "fsdp", True),
        ({"adapter": "lora", "deepspeed": "deepspeed_configs/zero3.json"}, "deepspeed", False),
        ({"adapter": "lora", "ddp_find_unused_parameters": True}, "ddp", False),
    ],
)
def test_recipes_that_ask_for_devices_of_their_own(keys: dict[str, Any], method: str, full: bool) -> None:
    launch = launch_of(make(**keys), 2)
    assert launch is not None
    assert (launch.method, launch.full, launch.ranks) == (method, full, keys.get("devices", 2))


@pytest.mark.parametrize("keys", [{}, {"bf16": "auto"}, {"fp16": True}])
def test_other_adapters_are_trained_inside_the_server(keys: dict[str, Any]) -> None:
    assert launch_of(make(adapter="lora", **keys), 2) is None


@pytest.mark.parametrize("key", ["deepspeed", "fsdp", "fsdp_config", "ddp", "devices", "bf16"])
def test_without_devices_the_keys_are_noted(key: str) -> None:
    value: Any = {"fsdp_config": {"offload_params": True}, "devices": 2, "bf16": "auto"}.get(key, "zero2")
    recipe = make(0, adapter="lora", **{key: True if key == "ddp" else value})
    assert launch_of(recipe, 0) is None
    assert [note for note in recipe.notes if note.startswith(f"{key} is ignored: ")]


def test_without_devices_all_weights_are_refused_in_a_sentence() -> None:
    found = problems(0, deepspeed="zero2")
    assert list(found) == ["adapter"]
    assert "trainer.devices" in found["adapter"]


@pytest.mark.parametrize(
    ("keys", "key", "text"),
    [
        ({"devices": 3}, "devices", "at most 2"),
        ({"deepspeed": "zero2", "fsdp": ["full_shard"]}, "deepspeed", "two ways"),
        ({"bf16": True, "fp16": True}, "fp16", "one of them"),
        ({"rl": "dpo"}, "rl", "`adapter: lora`"),
        ({"optimizer": "muon"}, "optimizer", "adamw_torch_fused"),
        ({"deepspeed": "zero2", "optimizer": "lion"}, "optimizer", "deepspeed"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha", "leave it out"),
        ({"loraplus_lr_ratio": 4}, "loraplus_lr_ratio", "leave it out"),
        ({"unfrozen_parameters": ["^lm_head"]}, "unfrozen_parameters", "without an adapter"),
        ({"adapter": "lora", "devices": 2, "peft_use_dora": True}, "peft_use_dora", "serving process"),
        ({"adapter": "lora", "ddp": True, "lora_model_dir": "ahoy"}, "lora_model_dir", "serving process"),
        ({"adapter": "lora", "devices": 2, "tokens": ["<x>"]}, "tokens", "serving process"),
        ({"adapter": "lora", "ddp": True, "added_tokens_overrides": {"5": "<x>"}}, "added_tokens_overrides", "serving"),
        ({"adapter": "lora", "devices": 2, "lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save", "serving"),
        ({"adapter": "lora", "devices": 2, "peft_init_lora_weights": "pissa"}, "peft_init_lora_weights", "pissa"),
        ({"fsdp_config": {"offload_parms": True}}, "fsdp_config.offload_parms", "offload_params"),
    ],
)
def test_what_a_launched_job_cannot_have(keys: dict[str, Any], key: str, text: str) -> None:
    found = problems(**keys)
    assert list(found) == [key]
    assert text in found[key]


def test_notes_of_a_whole_model() -> None:
    notes = make(lora_r=8, load_in_4bit=True, fsdp_config={"fsdp_state_dict_type": "FULL_STATE_DICT"}).notes
    assert "lora_r is ignored: there is no adapter." in notes
    assert any(note.startswith("fsdp_config.fsdp_state_dict_type is ignored: ") for note in notes) or any(
        note.startswith("fsdp_config.state_dict_type is ignored: ") for note in notes
    )
    assert any(note.startswith("load_in_4bit is ignored: weights are float32") for note in notes)


def test_older_fsdp_says_the_same() -> None:
    older = fsdp_options(make(fsdp=["shard_grad_op auto_wrap", "offload"]))
    assert (older.offload_params, older.reshard_after_forward) == (True, False)
    newer = fsdp_options(make(fsdp_config={"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing": True}))
    assert (newer.offload_params, newer.reshard_after_forward, newer.activation_checkpointing) == (False, False, True)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"bf16": "auto", "fp16": False}, "auto"),
        ({"fp16": True}, "float16"),
    ],
)
def test_precision(keys: dict[str, Any], precision: str) -> None:
    launch = launch_of(make(**keys), 1)
    assert launch is not None
    assert launch.precision == precision


def test_an_adapters_own_tokens_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace
    from types import SimpleNamespace
    from typing import cast

    from runtime.engine.launched import refuse_own_tokens
    from runtime.model.vocabulary import RowTargets
    from runtime.trainer.plan.plan import Plan
    from runtime.trainer.plan.vocabulary import VocabularyPlan

    own = VocabularyPlan(tokenizer=cast(Any, None), eos_id=3, rows=RowTargets())
    recipe = make(adapter="lora", ddp=True, special_tokens={"eos_token": "x"})
    plan = cast(Plan, SimpleNamespace(vocabulary=own, recipe=recipe, launch=launch_of(recipe, 2)))
    with pytest.raises(InvalidRequest) as caught:
        refuse_own_tokens(plan)
    assert caught.value.param == "special_tokens"
    plan.vocabulary = replace(own, eos_id=None)  # type: ignore[misc]
    refuse_own_tokens(plan)
