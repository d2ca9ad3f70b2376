"""The reference page and the JSON schema: complete and current."""

from pathlib import Path
from typing import Any

import pytest

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.document import read_document
from runtime.trainer.recipe.keys import NOTED, REFUSED
from runtime.trainer.recipe.reference import json_schema, reference
from runtime.trainer.recipe.schema import INTERNAL, Recipe
from runtime.trainer.recipe.verdicts import explain, nearest_key, verdicts

ROOT = Path(__file__).parent.parent.parent.parent

AXOLOTL = """
base_model revision_of_model model_type tokenizer_type tokenizer_config trust_remote_code output_dir sequence_len
micro_batch_size gradient_accumulation_steps batch_size eval_batch_size learning_rate optimizer lr_scheduler
cosine_min_lr_ratio num_epochs max_steps warmup_ratio warmup_steps weight_decay max_grad_norm adam_beta1 adam_beta2
adam_epsilon bf16 fp16 bfloat16 float16 datasets test_datasets val_set_size dataset_prepared_path
shuffle_merged_datasets dataset_exact_deduplication chat_template chat_template_jinja special_tokens tokens eot_tokens
train_on_inputs group_by_length sample_packing eval_sample_packing pad_to_sequence_len attn_implementation
flash_attention gradient_checkpointing gradient_checkpointing_kwargs adapter lora_r lora_alpha lora_dropout
lora_target_modules lora_target_linear lora_modules_to_save lora_fan_in_fan_out lora_model_dir peft_use_rslora
peft_use_dora load_in_4bit load_in_8bit bnb_config_kwargs resume_from_checkpoint auto_resume_from_checkpoints
saves_per_epoch save_steps save_strategy save_total_limit save_only_model evals_per_epoch eval_steps eval_strategy
early_stopping_patience metric_for_best_model load_best_model_at_end logging_steps seed wandb_project wandb_entity
wandb_name wandb_watch wandb_log_model wandb_run_id wandb_mode use_tensorboard loss_watchdog_threshold
loss_watchdog_patience excess_length_strategy min_sample_len do_causal_lm_eval eval_causal_lm_metrics
eval_max_new_tokens eval_table_size ddp_find_unused_parameters neftune_noise_alpha default_system_message
tf32 plugins liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_rms_norm_gated
liger_fused_linear_cross_entropy cut_cross_entropy lora_mlp_kernel lora_qkv_kernel lora_o_kernel strict
remove_unused_columns torch_compile torch_compile_mode flash_attn_cross_entropy flash_attn_rms_norm
flash_attn_fuse_mlp flash_optimum activation_offloading use_kernels low_cpu_mem_usage device_map
experimental_skip_move_to_device flex_attn_compile_kwargs fused_attn_kernel gemma4_hybrid_attn_impl hf_use_auth_token
tokenizer_use_fast tokenizer_legacy resize_token_embeddings_to_32x hub_model_id debug gptq_groupsize gptq_model_v1
torchdistx_path save_safetensors use_wandb full_finetune torch_dtype deepspeed fsdp fsdp_config fsdp_version
dp_shard_size dp_replicate_size context_parallel_size tensor_parallel_size accelerator_config ddp local_rank
"""
"""The keys that its example recipes use for supervised fine-tuning of text models."""


DATASET = """
chat_template chat_template_jinja conversation data_files drop_system_message ds_type field field_human field_messages
field_model field_thinking field_tools input_format input_transform logprobs_field message_field_content
message_field_role message_field_training message_field_training_detail message_property_mappings name path
preprocess_shards revision roles roles_to_train shards shards_idx split split_thinking temperature
template_thinking_key train_on_eos train_on_eot trust_remote_code type
"""
"""The keys of its datasets."""


def test_every_common_key_is_known_in_exactly_one_way() -> None:
    keys = set(Recipe.__struct_fields__) - {"notes"}
    assert not set(AXOLOTL.split()) - keys - set(NOTED) - set(REFUSED)
    assert not keys & set(NOTED)
    assert not keys & set(REFUSED)
    assert not set(NOTED) & set(REFUSED)


def test_every_key_of_axolotls_schema_has_a_verdict() -> None:
    """`axolotl_keys.txt` has the names of its schema of 2026, and those of its integrations that recipes use."""
    names = (ROOT / "tests/trainer/recipe/axolotl_keys.txt").read_text(encoding="utf-8").split()
    assert len(names) > 400
    assert not [name for name in names if explain(name) is None]
    assert not [name for name in DATASET.split() if explain(f"datasets.{name}") is None]
    assert explain("lora_s") is None
    assert nearest_key("lora_s") == "lora_r"


def test_the_page_is_current() -> None:
    checked_in = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert checked_in == reference(), "run: eft recipe docs > docs/recipes.md"


def test_the_page_names_every_key() -> None:
    page = reference()
    keys = {*Recipe.__struct_fields__, *Dataset.__struct_fields__, *NOTED, *REFUSED} - INTERNAL
    assert not {key for key in keys if f"`{key}`" not in page}


@pytest.mark.parametrize("name", ["starter", "tickets", "newts", "template", "tokens"])
def test_the_examples_are_valid_by_the_schema(name: str) -> None:
    """By the validator that comes with schemathesis."""
    jsonschema: Any = pytest.importorskip("jsonschema_rs")
    values = read_document((ROOT / "settings" / "recipes" / f"{name}.yaml").read_bytes()).values
    validator = jsonschema.validator_for(json_schema())
    assert validator.is_valid({**values, "bf16": "auto"})
    assert not validator.is_valid({**values, "lora_r": 0})
    assert not validator.is_valid({**values, "lora_rr": 1})


def test_a_verdict_for_each_key_in_the_recipes_order() -> None:
    entry = {"path": "a", "shards": 2, "trust_remote_code": True, "input_format": "x", "pth": 1, "field_human": "me"}
    found = verdicts(
        {
            "lora_r": 8,
            "load_in_4bit": True,
            "tf32": None,
            "adam_eps": 1e-6,
            "use_pose": True,
            "lora_rr": 1,
            "datasets": entry,
        }
    )
    assert [(one.key, one.verdict) for one in found] == [
        ("lora_r", "works"), ("load_in_4bit", "noted"), ("tf32", "off"), ("adam_eps", "renamed"),
        ("use_pose", "refused"),
        ("lora_rr", "unknown"), ("datasets", "works"), ("datasets[0].path", "works"), ("datasets[0].shards", "works"),
        ("datasets[0].trust_remote_code", "noted"), ("datasets[0].input_format", "refused"),
        ("datasets[0].pth", "unknown"), ("datasets[0].field_human", "renamed"),
    ]  # fmt: skip
    why = {one.key: one.why for one in found}
    assert why["adam_eps"] == "adam_epsilon"
    assert why["lora_rr"] == "did you mean lora_r?"


def test_keys_that_act_on_devices_of_their_own_say_so() -> None:
    found = {one.key: one for one in verdicts({"deepspeed": "zero2", "fsdp": [], "bf16": "auto", "devices": None})}
    assert {key: one.verdict for key, one in found.items()} == {
        "deepspeed": "works", "fsdp": "off", "bf16": "works", "devices": "off",
    }  # fmt: skip
    assert "trainer.devices" in found["deepspeed"].why
    assert "trainer.devices" in (explain("fsdp_config") or "")
