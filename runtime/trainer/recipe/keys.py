"""Axolotl's keys that are not fields of ours: noted without an effect, refused with the way out, or older names."""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from runtime.trainer.recipe.schema import Recipe

# -- noted -----------------------------------------------------------------------------------------
#
# Keys of Axolotl that are accepted with any value and do nothing here, each with why that is right.
#
# They say how something is computed or where a copy goes, never what is learned. A key that is off (null or false) is
# not mentioned; of any other the plan has a note.

_KERNELS = "the server's own kernels compute this"
_SERVED = "the model is loaded already, by the server"
_TRACKING = "nothing is sent; losses are in the job's events and in /metrics"
_STATE = "the server keeps jobs and checkpoints in its state directory"
_ONE = "there is one process"
_PRECISION = "the base is trained on in the type in which it is served"
_PADDING = "batches have no padding here"

NOTED: dict[str, str] = {
    "revision_of_model": _SERVED,
    "model_type": _SERVED,
    "tokenizer_type": _SERVED,
    "tokenizer_use_fast": _SERVED,
    "tokenizer_legacy": _SERVED,
    "low_cpu_mem_usage": _SERVED,
    "device_map": _SERVED,
    "experimental_skip_move_to_device": _SERVED,
    "hf_use_auth_token": _SERVED,
    "gptq_groupsize": _SERVED,
    "gptq_model_v1": _SERVED,
    "tokenizer_use_mistral_common": _SERVED,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "tf32": _PRECISION,
    "torch_dtype": _PRECISION,
    "load_in_4bit": _PRECISION,
    "load_in_8bit": _PRECISION,
    "bnb_config_kwargs": _PRECISION,
    "quantize_moe_experts": _PRECISION,
    "model_quantization_config": _PRECISION,
    "model_quantization_config_kwargs": _PRECISION,
    "attn_implementation": _KERNELS,
    "flash_attention": _KERNELS,
    "flash_attn_cross_entropy": _KERNELS,
    "flash_attn_rms_norm": _KERNELS,
    "flash_attn_fuse_mlp": _KERNELS,
    "flash_optimum": _KERNELS,
    "flex_attn_compile_kwargs": _KERNELS,
    "fused_attn_kernel": _KERNELS,
    "gemma4_hybrid_attn_impl": _KERNELS,
    "experts_implementation": _KERNELS,
    "use_scattermoe": _KERNELS,
    "use_sonicmoe": _KERNELS,
    "use_dsv4_kernels": _KERNELS,
    "use_glm_dsa_kernels": _KERNELS,
    "dsv4_fp4_grouped_mode": _KERNELS,
    "tiled_mlp": _KERNELS,
    "llama4_linearized_experts": _KERNELS,
    "plugins": "they are Axolotl's own code, and " + _KERNELS,
    "liger_rope": _KERNELS,
    "liger_rms_norm": _KERNELS,
    "liger_glu_activation": _KERNELS,
    "liger_layer_norm": _KERNELS,
    "liger_rms_norm_gated": _KERNELS,
    "liger_fused_linear_cross_entropy": _KERNELS,
    "cut_cross_entropy": "the loss is always computed in chunks",
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "use_kernels": _KERNELS,
    "torch_compile": _KERNELS,
    "torch_compile_mode": _KERNELS,
    "activation_offloading": "activations stay where they are; gradient_checkpointing saves memory",
    "gradient_checkpointing_kwargs": "there is one way of checkpointing",
    "pad_to_sequence_len": _PADDING,
    "resize_token_embeddings_to_32x": "embeddings are not changed",
    "eval_sample_packing": _PADDING,
    "remove_unused_columns": "fields of the data that no format reads are left alone",
    "strict": "unknown keys are always errors",
    "debug": "the plan of a dry run shows the first examples",
    "dataset_prepared_path": "each job keeps its prepared data in its own folder",
    "save_only_model": "checkpoints always hold all that is needed to resume",
    "save_safetensors": "adapters are always safetensors",
    "auto_resume_from_checkpoints": "an interrupted job always resumes",
    "logging_steps": "every step is reported",
    "do_causal_lm_eval": "evaluations report loss and accuracy",
    "eval_max_new_tokens": "evaluations generate no text",
    "eval_table_size": "evaluations generate no text",
    "torchdistx_path": _ONE,
    "ddp_find_unused_parameters": _ONE,
    "accelerator_config": _ONE,
    "local_rank": _ONE,
    "hub_model_id": "adapters are published by this server, not sent to a hub",
    "full_finetune": "`adapter` decides",
    "use_wandb": _TRACKING,
    "wandb_project": _TRACKING,
    "wandb_entity": _TRACKING,
    "wandb_name": _TRACKING,
    "wandb_watch": _TRACKING,
    "wandb_log_model": _TRACKING,
    "wandb_run_id": _TRACKING,
    "wandb_mode": _TRACKING,
    "use_tensorboard": _TRACKING,
}


# -- refused ---------------------------------------------------------------------------------------
#
# Keys of Axolotl that are understood and refused when they are on, each with what is supported instead.
#
# Null and false are off for each of them, so that recipes which spell out their defaults work.

OFF: tuple[Any, ...] = (None, False, [], {}, "")


class Refused(Struct, frozen=True):
    """Why a key is refused, and the values that ask for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()
    later: bool = False
    """Nothing speaks against it, but that it is not built."""

    def asks_for_nothing(self, value: Any) -> bool:
        return any(type(value) is type(off) and value == off for off in (*OFF, *self.harmless))


_ONE_DEVICE = Refused("a job trains in the one serving process, on one device; leave it out", (1,))
_MODEL = Refused("the model and its tokenizer are the served ones, and cannot be changed by a job")

REFUSED: dict[str, Refused] = {
    "trust_remote_code": Refused("code that comes with a model is never run; leave it out"),
    "tokenizer_config": Refused("the tokenizer is the served model's; leave it out"),
    "fp16": Refused(
        "training in float16 is not supported: the base is trained on in float32 or bfloat16, as it is served"
    ),
    "float16": Refused(
        "training in float16 is not supported: the base is trained on in float32 or bfloat16, as it is served"
    ),
    "lora_modules_to_save": Refused("only low-rank adapters are trained; embeddings and head stay as they are"),
    "lora_fan_in_fan_out": Refused("how weights are stored is known from the served model; leave it out"),
    "lora_model_dir": Refused("a job starts from a fresh adapter; going on from another one is not supported yet"),
    "peft_use_dora": Refused("DoRA is not supported yet; plain LoRA and rsLoRA (peft_use_rslora) are"),
    "resume_from_checkpoint": Refused("a job resumes from its own checkpoints: POST /admin/jobs/{id}/resume"),
    "neftune_noise_alpha": Refused("noise on the embeddings is not supported; lora_dropout is", (0, 0.0)),
    "eval_causal_lm_metrics": Refused(
        "evaluations report loss and accuracy, and metrics of generated text are not supported yet",
        (["perplexity"],),  # the exponential of the loss
    ),
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "fsdp_config": _ONE_DEVICE,
    "fsdp_version": Refused(_ONE_DEVICE.why, (1, 2)),  # says nothing without fsdp_config
    "dp_shard_size": _ONE_DEVICE,
    "dp_replicate_size": _ONE_DEVICE,
    "context_parallel_size": _ONE_DEVICE,
    "tensor_parallel_size": _ONE_DEVICE,
    "ddp": _ONE_DEVICE,
    "rl": Refused("preference and reinforcement training are not supported yet; supervised fine-tuning is"),
    "pretraining_dataset": Refused("use datasets with `type: completion`"),
    "streaming": Refused("data is read whole before a job starts"),
    "max_packed_sequence_len": Refused("an old name: use sample_packing and sequence_len"),
    "push_dataset_to_hub": Refused("nothing is sent to a hub"),
    "unfrozen_parameters": Refused("only low-rank adapters are trained; the base stays as it is"),
    "processor_type": Refused("models of images or sound are not served"),
    "skip_prepare_dataset": Refused("data is always prepared here"),
    "model_config": _MODEL,
    "gptq": _MODEL,
    "curriculum_sampling": Refused("use `shuffle_merged_datasets: false` to keep the order of the files"),
}

_LATER = """
    base_model_ignore_patterns center_rewards_coefficient cls_model_config cosine_constant_lr_ratio diffusion
    eaft_alpha eaft_k ebft eta_min expert_parallel_num_nvl_bytes expert_parallel_size expert_parallel_token_capacity
    fp8 fp8_enable_fsdp_float8_all_gather freeze_mm_modules gptq_disable_exllama jagged_restart_anneal_steps
    jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight lisa_layers_attribute lisa_n_layers
    lisa_step_interval llmcompressor lora_layers_to_transform lora_target_parameters loraplus_lr_ratio
    lr_quadratic_warmup num_labels nvfp4_merge_aware orpo_alpha otel_metrics_host otel_metrics_port peft
    pretrain_multipack_attn process_reward_model qat ray_num_workers reinit_weights relora relora_cpu_offload
    relora_prune_ratio reward_model rl_beta sample_packing_eff_est sample_packing_seq_len_multiplier
    sample_packing_sequentially streaming_multipack_buffer_size swanlab_completion_log_interval
    swanlab_completion_max_buffer swanlab_description swanlab_experiment_name swanlab_log_completions
    swanlab_log_model swanlab_mode swanlab_project swanlab_workspace total_num_tokens trackio_project_name
    trackio_run_name trackio_space_id trl use_eaft use_onebitllms use_otel_metrics use_ray use_swanlab vllm
"""
REFUSED |= {name: Refused("a key of Axolotl that is not built yet", later=True) for name in _LATER.split()}


# -- notes -----------------------------------------------------------------------------------------
#
# What a recipe says that does nothing here, or something else than it seems to: a line each, for the plan.


def of(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[str]:
    """The notes on a recipe that was accepted; `values` are its keys as they were given."""
    for key, why in NOTED.items():
        if not any(values.get(key) is off or values.get(key) == off for off in OFF):
            yield f"{key} is ignored: {why}."
    if recipe.adapter == "qlora" and "load_in_4bit" not in values:
        yield f"adapter qlora is lora here: {NOTED['load_in_4bit']}."
    if isinstance(way := values.get("gradient_checkpointing"), str) and way not in ("true", "yes", "on"):
        yield f"gradient_checkpointing {way} is true here: nothing is moved to another memory."
    if recipe.lora_target_linear and recipe.lora_target_modules is not None:
        yield "lora_target_modules adds nothing to lora_target_linear, which adapts every linear."
    if recipe.max_steps is not None and values.get("num_epochs") is not None:
        yield f"max_steps ({recipe.max_steps}) decides, not num_epochs ({recipe.num_epochs:g})."
    if recipe.lr_scheduler == "constant" and (recipe.warmup_steps or recipe.warmup_ratio):
        yield "lr_scheduler constant has no warmup; constant_with_warmup has."
    if not recipe.evaluates and (
        recipe.evals_per_epoch or recipe.eval_steps or recipe.eval_strategy in ("steps", "epoch")
    ):
        yield "Nothing is evaluated: there are neither test_datasets nor val_set_size."
    if recipe.optimizer_family == "adamw_8bit":
        yield f"optimizer {recipe.optimizer} keeps its state in 8 bits where bitsandbytes works, else in 32."


# -- older -----------------------------------------------------------------------------------------
#
# Forms that older recipes of Axolotl have, read as what they are called now, with a note that gives the new lines.
#
# `type: sharegpt` is chats whose messages are called `from` and `value`. Axolotl has dropped it for `chat_template`.

_SHAREGPT: dict[str, dict[str, Any]] = {
    "sharegpt": {"role": "from", "content": "value"},
    "sharegpt:chat": {"role": "from", "content": "value"},
    "sharegpt_simple": {"role": "from", "content": "value"},
    "sharegpt.load_role": {"role": "role", "content": "value"},
    "sharegpt.load_guanaco": {"role": "role", "content": "text"},
    "sharegpt.load_ultrachat": {"role": "role", "content": "content"},
}
"""Type → the template's names of a message's fields → the file's."""
_ROLES = {"input": "user", "output": "assistant"}
"""Sides of a chat, as the older `roles` called them."""
_SIDES = {"field_human": "user", "field_model": "assistant"}
"""Older keys with the name of one role."""
_GROUPS = ("datasets", "test_datasets")


class Modern(Struct):
    """A recipe's values in today's form."""

    values: dict[str, Any]
    notes: list[str]


def modernise(values: Mapping[str, Any]) -> Modern:
    """The same recipe without older forms. What is not one of them stays, to be refused by name."""
    found, notes = dict(values), list[str]()
    for group in _GROUPS:
        entries = found.get(group)
        many = [entries] if isinstance(entries, dict) else entries
        if isinstance(many, list):
            found[group] = [_entry(entry, f"{group}[{index}]", notes) for index, entry in enumerate(many)]
    return Modern(found, notes)


def _entry(entry: Any, path: str, notes: list[str]) -> Any:
    if not isinstance(entry, dict) or not isinstance(kind := entry.get("type"), str) or kind not in _SHAREGPT:
        return entry
    field = "messages" if kind.endswith("ultrachat") else "conversations"
    modern: dict[str, Any] = {
        "type": "chat_template",
        "field_messages": entry.get("field") or field,
        "message_property_mappings": _SHAREGPT[kind],
    }
    rest = {key: value for key, value in entry.items() if key not in ("type", "field", "conversation")}
    if entry.get("conversation") is not None:  # what fastchat called a template
        modern["chat_template"] = str(entry["conversation"]).replace("-", "_").lower()
    roles = rest.pop("roles", None)
    named = {_ROLES.get(role, role): names for role, names in (roles if isinstance(roles, dict) else {}).items()}
    for key, role in _SIDES.items():
        if isinstance(name := rest.pop(key, None), str):
            named.setdefault(role, [name])
    if named:
        modern["roles"] = named
    whole = {**modern, **rest}
    notes.append(f"{path}: type {kind} is an older form; it is read as {_lines(whole, modern)}.")
    return whole


def _lines(entry: Mapping[str, Any], modern: Mapping[str, Any]) -> str:
    """The lines that say the same today, as YAML has them."""
    return ", ".join(f"`{key}: {_flow(entry[key])}`" for key in modern)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(_flow, value)) + "]" if isinstance(value, list | tuple) else str(value)
