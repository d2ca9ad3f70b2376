"""Jobs of other trainers as recipes. The jobs are written after the examples in their documents."""

from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.trainer.recipe import Document, recipe_from
from runtime.trainer.recipe.convert import convert

FACTORY: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity, talks",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "report_to": "none",
    "image_max_pixels": 262144,
}
INFO = {
    "identity": {"file_name": "identity.json"},
    "talks": {
        "file_name": "talks.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "tools": "tools"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "human", "assistant_tag": "bot"},
    },
}


def test_a_recipe_of_llama_factorys() -> None:
    found = convert(FACTORY, INFO)
    assert found.notes == ["image_max_pixels is left out: no key of recipes is like it."]
    recipe = recipe_from(Document(found.values), max_lora_rank=64)
    assert (recipe.lora_r, recipe.lora_alpha, recipe.sequence_len, recipe.effective_batch) == (8, 16.0, 2048, 8)
    assert (recipe.num_epochs, recipe.learning_rate, recipe.chat_template) == (3, 1e-4, "llama3")
    assert recipe.lora_target_linear is True
    alpaca, talks = recipe.datasets
    assert (alpaca.path, alpaca.type, alpaca.split) == ("identity.json", "chat_template.alpaca", "train[:1000]")
    assert (talks.path, talks.type, talks.field_tools) == ("talks.jsonl", "chat_template", "tools")
    assert talks.properties == {"role": "role", "content": "content"}
    assert talks.roles == {"user": ("human",), "assistant": ("bot",)}


def test_targets_and_templates_without_a_counterpart() -> None:
    found = convert({**FACTORY, "lora_target": "q_proj,v_proj", "template": "yi_vl", "dataset": ["x"]})
    assert found.values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert "template yi_vl has no counterpart; the served model's own is used." in found.notes
    assert "dataset x is not in dataset_info.json: give its file as path." in found.notes


def test_texts_and_preferences() -> None:
    texts = convert({**FACTORY, "stage": "pt"}, {"identity": {"file_name": "a.txt", "columns": {"prompt": "body"}}})
    assert texts.values["datasets"][0] == {
        "path": "a.txt", "type": "completion", "field": "body", "split": "train[:1000]",
    }  # fmt: skip
    preferences = convert({**FACTORY, "stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.2}, INFO)
    assert (preferences.values["rl"], preferences.values["dpo_beta"]) == ("orpo", 0.2)


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"finetuning_type": "full"}, "finetuning_type", "recipes train adapters"),
        ({"stage": "ppo"}, "stage", "recipes have sft, pt, dpo and kto"),
        ({"model_name_or_path": None}, "recipe", ""),
    ],
)
def test_what_recipes_do_not_have(changed: dict[str, Any], param: str, message: str) -> None:
    values = {key: value for key, value in {**FACTORY, **changed}.items() if value is not None}
    with pytest.raises(InvalidRequest, match=message) as caught:
        convert(values, INFO)
    assert caught.value.param == param


def test_a_job_of_openais() -> None:
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    found = convert(
        {
            "model": "tiny",
            "training_file": "file-abc",
            "validation_file": "file-def",
            "suffix": "newts",
            "seed": 7,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "metadata": {"a": "b"},
        }
    )
    assert found.notes == ["metadata is left out."]
    recipe = recipe_from(Document(found.values), max_lora_rank=64)
    assert (recipe.name, recipe.seed, recipe.num_epochs, recipe.micro_batch_size) == ("newts", 7, 2, 4)
    assert recipe.learning_rate == 1e-4
    assert (recipe.datasets[0].path, recipe.test_datasets[0].path) == ("file-abc", "file-def")
    auto = convert({"model": "tiny", "training_file": "file-abc", "hyperparameters": {"n_epochs": "auto"}})
    assert (auto.values["num_epochs"], auto.values["learning_rate"]) == (3, 2e-4)
    with pytest.raises(InvalidRequest, match="supervised and dpo"):
        convert({"model": "tiny", "training_file": "f", "method": {"type": "reinforcement"}})
