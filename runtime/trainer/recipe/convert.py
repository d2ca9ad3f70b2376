"""Other trainers' jobs as recipes: LLaMA-Factory's YAML, and the JSON of OpenAI's fine-tuning jobs."""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from runtime.errors import InvalidRequest
from runtime.trainer.recipe.keys import is_off


class Converted(Struct):
    """A recipe's values, and remarks on what was not taken over as it stood."""

    values: dict[str, Any]
    notes: list[str]


def convert(values: Mapping[str, Any], datasets: Mapping[str, Any] | None = None) -> Converted:
    """The recipe of another trainer's job. `datasets`: the contents of LLaMA-Factory's `dataset_info.json`, where it is
    at hand. Raises `InvalidRequest` for what is neither, or for a kind of training that recipes do not have."""
    if "training_file" in values and "model" in values:
        return _from_openai(values)
    if "model_name_or_path" in values and {"stage", "finetuning_type", "dataset"} & values.keys():
        return _from_llama_factory(values, datasets or {})
    raise InvalidRequest(
        "This is neither a recipe of LLaMA-Factory (model_name_or_path, stage, dataset) nor a fine-tuning job of "
        "OpenAI (model, training_file).",
        param="recipe",
    )


# -- OpenAI ----------------------------------------------------------------------------------------

_MULTIPLIED = 2e-4
"""Learning rate at a multiplier of 1, as `/v1/fine_tuning/jobs` has it."""


def _from_openai(values: Mapping[str, Any]) -> Converted:
    notes = list[str]()
    method = values.get("method") or {}
    kind = method.get("type", "supervised")
    if kind not in ("supervised", "dpo"):
        raise InvalidRequest(f"method.type is {kind!r}; recipes have supervised and dpo.", param="method.type")
    chosen = (method.get(kind) or {}).get("hyperparameters") or values.get("hyperparameters") or {}
    recipe: dict[str, Any] = {"base_model": values["model"], "adapter": "lora"}
    if values.get("suffix"):
        recipe["name"] = values["suffix"]
    entry: dict[str, Any] = {"ds_type": "jsonl", "type": "chat_template"}
    recipe["datasets"] = [{"path": values["training_file"], **entry}]
    if values.get("validation_file"):
        recipe["test_datasets"] = [{"path": values["validation_file"], **entry}]
    if kind == "dpo":
        recipe["rl"] = "dpo"
        notes.append("method dpo: check the columns of the preference pairs (datasets.type, field_chosen).")
    multiplier = chosen.get("learning_rate_multiplier", "auto")
    recipe["learning_rate"] = _MULTIPLIED * (1 if multiplier == "auto" else float(multiplier))
    for name, key in (("n_epochs", "num_epochs"), ("batch_size", "micro_batch_size"), ("beta", "dpo_beta")):
        if chosen.get(name, "auto") != "auto":
            recipe[key] = chosen[name]
    recipe.setdefault("num_epochs", 3)
    recipe.setdefault("micro_batch_size", 4)
    if values.get("seed") is not None:
        recipe["seed"] = values["seed"]
    known = {"model", "training_file", "validation_file", "suffix", "seed", "method", "hyperparameters"}
    notes += [f"{key} is left out." for key in values if key not in known and not is_off(values[key])]
    return Converted(recipe, notes)


# -- LLaMA-Factory ---------------------------------------------------------------------------------

_SAME = (
    "lora_alpha lora_dropout output_dir logging_steps save_steps save_strategy learning_rate max_steps warmup_ratio "
    "warmup_steps bf16 fp16 deepspeed fsdp_config gradient_accumulation_steps eval_steps eval_strategy weight_decay "
    "max_grad_norm adam_beta1 adam_beta2 adam_epsilon seed neftune_noise_alpha save_total_limit trust_remote_code "
    "simpo_gamma resume_from_checkpoint loraplus_lr_ratio save_only_model"
)
_RENAMED = {
    "model_name_or_path": "base_model",
    "lora_rank": "lora_r",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "cutoff_len": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "val_size": "val_set_size",
    "packing": "sample_packing",
    "neat_packing": "sample_packing",
    "train_on_prompt": "train_on_inputs",
    "adapter_name_or_path": "lora_model_dir",
    "additional_target": "lora_modules_to_save",
    "pref_beta": "dpo_beta",
}
_HOW = (
    "do_train do_eval do_predict overwrite_output_dir overwrite_cache plot_loss report_to preprocessing_num_workers "
    "dataloader_num_workers ddp_timeout flash_attn include_num_input_tokens_seen run_name dataset_dir stage "
    "finetuning_type dataset eval_dataset template lora_target quantization_bit quantization_method pref_loss "
    "max_samples streaming gradient_checkpointing"
)
_TEMPLATES = {
    "alpaca": "alpaca", "chatml": "chatml", "cohere": "cohere", "deepseek": "deepseek_v2", "deepseek3": "deepseek_v3",
    "exaone": "exaone", "gemma": "gemma", "gemma2": "gemma", "gemma3": "gemma3", "llama2": "llama2", "llama3": "llama3",
    "llama4": "llama4", "mistral": "mistral_v2v3", "phi": "phi_35", "phi4": "phi_4", "qwen": "qwen_25",
    "qwen3": "qwen3", "qwen3_nothink": "chatml", "vicuna": "vicuna", "zephyr": "zephyr", "falcon_h1": "falcon_h1",
}  # fmt: skip
"""LLaMA-Factory's name of a template → a recipe's."""
_LOSSES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto_pair": "kto"}


def _from_llama_factory(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Converted:
    notes = list[str]()
    if (tuning := values.get("finetuning_type", "lora")) != "lora":
        raise InvalidRequest(
            f"finetuning_type is {tuning!r}; recipes train adapters (finetuning_type: lora).", param="finetuning_type"
        )
    recipe: dict[str, Any] = {"adapter": "qlora" if values.get("quantization_bit") else "lora"}
    for name, value in values.items():
        if name in _SAME.split() or name in _RENAMED:
            recipe[_RENAMED.get(name, name)] = value
        elif name not in _HOW.split() and not is_off(value):
            notes.append(f"{name} is left out: no key of recipes is like it.")
    _add_targets(values.get("lora_target", "all"), recipe)
    recipe.setdefault("lora_r", 8)
    recipe.setdefault("lora_alpha", 2 * recipe["lora_r"])
    _add_stage(values, recipe)
    _add_template(values.get("template"), recipe, notes)
    entry = _stage_entry(values)
    recipe["datasets"] = [entry(name, datasets.get(name), notes) for name in _names(values.get("dataset"))]
    if values.get("eval_dataset"):
        recipe["test_datasets"] = [entry(name, datasets.get(name), notes) for name in _names(values["eval_dataset"])]
    if values.get("max_samples") is not None:
        for one in recipe["datasets"]:
            one["split"] = f"train[:{values['max_samples']}]"
    return Converted(recipe, notes)


def _add_targets(targets: Any, recipe: dict[str, Any]) -> None:
    names = _names(targets)
    if names == ["all"]:
        recipe["lora_target_linear"] = True
    else:
        recipe["lora_target_modules"] = names


def _add_stage(values: Mapping[str, Any], recipe: dict[str, Any]) -> None:
    stage = values.get("stage", "sft")
    if stage in ("dpo", "kto"):
        recipe["rl"] = "kto" if stage == "kto" else _LOSSES.get(str(values.get("pref_loss", "sigmoid")), "dpo")
    elif stage not in ("sft", "pt"):
        raise InvalidRequest(f"stage is {stage!r}; recipes have sft, pt, dpo and kto.", param="stage")


def _add_template(name: Any, recipe: dict[str, Any], notes: list[str]) -> None:
    if name in _TEMPLATES:
        recipe["chat_template"] = _TEMPLATES[name]
    elif not is_off(name) and name != "default":
        notes.append(f"template {name} has no counterpart; the served model's own is used.")


def _stage_entry(values: Mapping[str, Any]) -> Callable[[str, Any, list[str]], dict[str, Any]]:
    texts = values.get("stage") == "pt"

    def entry(name: str, described: Any, notes: list[str]) -> dict[str, Any]:
        info = described if isinstance(described, Mapping) else {}
        path = info.get("file_name") or info.get("hf_hub_url") or name
        columns = info.get("columns") or {}
        if not info:
            notes.append(f"dataset {name} is not in dataset_info.json: give its file as path.")
        if texts:
            return {"path": path, "type": "completion", "field": columns.get("prompt", "text")}
        if info.get("formatting") == "sharegpt":
            return {"path": path, **_chats(columns, info.get("tags") or {})}
        if set(columns) - {"prompt", "query", "response"}:
            notes.append(f"dataset {name}: columns {', '.join(columns)}; check what is read.")
        return {"path": path, "type": "chat_template.alpaca"}

    return entry


def _chats(columns: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "chat_template",
        "field_messages": columns.get("messages", "conversations"),
        "message_property_mappings": {
            "role": tags.get("role_tag", "from"),
            "content": tags.get("content_tag", "value"),
        },
    }
    sides = {"user": "user_tag", "assistant": "assistant_tag", "system": "system_tag", "tool": "observation_tag"}
    roles = {role: [tags[tag]] for role, tag in sides.items() if tags.get(tag)}
    if roles:
        found["roles"] = roles
    for key, column in (("field_system", "system"), ("field_tools", "tools")):
        if columns.get(column):
            found[key] = columns[column]
    return found


def _names(value: Any) -> list[str]:
    """Names in a list, or in one text with commas between."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]
