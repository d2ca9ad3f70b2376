"""Axolotl's keys that are not fields of ours, once: noted without an effect, or refused with the way out.

A key that is off (null, false or empty) asks for nothing, and is neither mentioned nor refused. A key that becomes a
field of `Recipe` or `Dataset` leaves these tables by itself.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.schema import Recipe

OFF: tuple[Any, ...] = (None, False, [], {}, "")


def is_off(value: Any, harmless: tuple[Any, ...] = ()) -> bool:
    """True for a value that asks for nothing."""
    return any(type(value) is type(off) and value == off for off in (*OFF, *harmless))


# -- noted -----------------------------------------------------------------------------------------
#
# Keys that are accepted with any value and do nothing here, by the reason why that is right.
#
# They say how something is computed or where a copy goes, never what is learned.

_KERNELS = "the server's own kernels compute this"
_SERVED = "the model is loaded already, by the server"
_TOKENIZER = "the served model's tokenizer is used, in training as in serving"
_TRACKING = "nothing is sent; losses are in the job's events and in /metrics"
_STATE = "the server keeps jobs and checkpoints in its state directory"
_HUB = "adapters are published by this server, not sent to a hub"
_PRECISION = "the base is trained on in the type in which it is served"
_PADDING = "batches have no padding here"
_BINS = "bins are filled from the rows' real lengths"
_EMBEDDINGS = "embeddings are not changed"
_EVALUATION = "evaluations report loss and accuracy, and generate no text"
_READING = "data is read row by row, and prepared data is kept in the job's own folder"
_MEMORY = "memory is planned before a job starts; gradient_checkpointing saves activations"
_ADAPTER = "an adapter is served beside the base as it is, and nothing is merged"
_CHAT = "`eft chat NAME`, or any client, talks to the adapter on this server"
_DERIVED = "the architecture is known from the served model"
_PREFERENCE = "it says how preference losses are computed, which has one way here"

LAUNCH = (
    "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size "
    "context_parallel_size tensor_parallel_size sequence_parallel_degree expert_parallel_size "
    "expert_parallel_num_nvl_bytes expert_parallel_token_capacity ddp ddp_find_unused_parameters ddp_broadcast_buffers "
    "ddp_bucket_cap_mb ddp_timeout world_size local_rank accelerator_config torchdistx_path use_ray ray_num_workers "
    "ray_run_name resources_per_worker ring_attn_func heads_k_stride"
)
"""Keys that spread a run over processes."""
_ONE = "the job runs inside the serving process, over its one copy of the weights"

_NOTED = {
    _ONE: LAUNCH,
    _SERVED: (
        "revision_of_model model_type type_of_model trust_remote_code low_cpu_mem_usage device device_map max_memory "
        "gpu_memory_limit experimental_skip_move_to_device hf_use_auth_token gptq gptq_groupsize gptq_model_v1 "
        "gptq_disable_exllama base_model_config base_model_ignore_patterns qlora_sharded_model_loading cls_model_config"
    ),
    _DERIVED: "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
    _TOKENIZER: (
        "tokenizer_config tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
        "tokenizer_save_jinja_files"
    ),
    _PRECISION: (
        "bf16 bfloat16 fp16 float16 float32 tf32 torch_dtype fp8 fp8_enable_fsdp_float8_all_gather load_in_4bit "
        "load_in_8bit bnb_config_kwargs quantize_moe_experts model_quantization_config "
        "model_quantization_config_kwargs fp32_norms fp32_norm_classes embeddings_skip_upcast "
        "peft_autocast_adapter_dtype quantization llmcompressor"
    ),
    _KERNELS: (
        "attn_implementation flash_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "flash_attn_d512 flash_optimum flex_attention flex_attn_compile_kwargs fused_attn_kernel sdp_attention "
        "sdpa_varlen sage_attention xformers_attention eager_attention large_head_attention gemma4_hybrid_attn_impl "
        "batch_flattening experts_implementation use_kernels use_scattermoe use_sonicmoe use_dsv4_kernels "
        "use_glm_dsa_kernels dsv4_fp4_grouped_mode tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "llama4_linearized_experts liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
        "liger_rms_norm_gated liger_fused_linear_cross_entropy liger_cross_entropy lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel torch_compile torch_compile_backend torch_compile_mode "
        "torch_compile_options deepcompile pretrain_multipack_attn"
    ),
    "they are Axolotl's own code, and " + _KERNELS: "plugins",
    "the loss is always computed in chunks": (
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks"
    ),
    "activations stay where they are; gradient_checkpointing saves memory": (
        "activation_offloading layer_offloading selective_checkpointing lora_on_cpu"
    ),
    "there is one way of checkpointing": "gradient_checkpointing_kwargs",
    _MEMORY: "auto_find_batch_size gc_steps gc_collect_steps torch_empty_cache_steps",
    _PADDING: "pad_to_sequence_len pad_to_multiple_of eval_sample_packing",
    _BINS: (
        "sample_packing_bin_size sample_packing_group_size sample_packing_eff_est sample_packing_mp_start_method "
        "sample_packing_seq_len_multiplier multipack_real_batches total_num_tokens total_supervised_tokens "
        "streaming_multipack_buffer_size pretrain_multipack_buffer_size pretraining_sample_concatenation"
    ),
    _EMBEDDINGS: (
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings embedding_lr embedding_lr_scale "
        "loraplus_lr_embedding"
    ),
    "with an adapter every weight of the base stays as it is": "unfrozen_parameters freeze_mm_modules",
    "how weights are stored is known from the served model": "lora_fan_in_fan_out",
    "fields of the data that no format reads are left alone": "remove_unused_columns",
    "unknown keys are always errors": "strict",
    "the plan of a dry run shows the first examples": "debug",
    _READING: (
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory num_dataset_shards_to_save "
        "push_dataset_to_hub skip_prepare_dataset is_preprocess preprocess_iterable dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor"
    ),
    "no row is dropped: the last step of an epoch is smaller": "dataloader_drop_last",
    "where turns begin and end is found by rendering the chat": "role_boundaries",
    "checkpoints always hold all that is needed to resume": "save_only_model",
    "adapters are always safetensors": "save_safetensors",
    "an interrupted job always resumes": "auto_resume_from_checkpoints",
    "checkpoints follow save_steps, saves_per_epoch and save_strategy": "save_first_step dynamic_checkpoint",
    "every step is reported, with its tokens a second": "logging_steps include_tkps include_tokens_per_second",
    "a recipe profiles nothing; /metrics has the times of steps": "profiler_steps profiler_steps_start",
    _EVALUATION: (
        "do_causal_lm_eval eval_max_new_tokens eval_table_size do_bench_eval bench_dataset bench_split "
        "generate_samples num_generation_samples generation_do_sample generation_max_new_tokens "
        "generation_prompt_ratio generation_temperature generation_top_k generation_top_p dpo_generate_during_eval"
    ),
    _PREFERENCE: (
        "dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep precompute_ref_log_probs max_prompt_len"
    ),
    _HUB: "hub_model_id hub_revision hub_strategy",
    "`adapter` decides": "full_finetune",
    _ADAPTER: "merge_lora merge_method nvfp4_merge_aware",
    _CHAT: ("gradio_max_new_tokens gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title"),
    _STATE: "axolotl_config_path",
    _TRACKING: (
        "use_wandb wandb_project wandb_entity wandb_name wandb_watch wandb_log_model wandb_run_id wandb_mode "
        "use_tensorboard use_mlflow mlflow_experiment_name mlflow_run_name mlflow_tracking_uri "
        "hf_mlflow_log_artifacts use_comet comet_api_key comet_experiment_config comet_experiment_key comet_mode "
        "comet_online comet_project_name comet_workspace use_trackio trackio_project_name trackio_run_name "
        "trackio_space_id use_swanlab swanlab_project swanlab_workspace swanlab_experiment_name swanlab_description "
        "swanlab_mode swanlab_log_model swanlab_log_completions swanlab_completion_log_interval "
        "swanlab_completion_max_buffer"
    ),
    "the server's own /metrics are there for every collector": ("use_otel_metrics otel_metrics_host otel_metrics_port"),
    "Axolotl reads no such key either": "test_value",
}


# -- refused ---------------------------------------------------------------------------------------
#
# Keys that are refused when they are on, each with what is supported instead.


class Refused(Struct, frozen=True):
    """Why a key is refused, and the values that ask for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()
    parts: frozenset[str] = frozenset()
    """Keys of a mapping that make no difference here: a mapping of these alone asks for nothing."""
    of: str = ""
    """The key that decides about the kind of training to which this one belongs: its refusal is enough."""

    def asks_for_nothing(self, value: Any) -> bool:
        return is_off(value, self.harmless) or (isinstance(value, dict) and value.keys() <= self.parts)


_FULL = "adapter"
_LOADING = frozenset(
    {"output_router_logits", "use_cache", "attn_implementation", "torch_dtype", "dtype", "low_cpu_mem_usage"}
)
"""Keys of a model's configuration that say how it is loaded, or what it returns."""
_WHOLE = "it is a way of training all weights, which are being served; `adapter: lora` trains an adapter instead"
_MODEL = "the model is the served one, and its configuration cannot be changed by a job; leave it out"
_IMAGES = "models of images or sound are not trained; leave it out, and train on rows of text"
_RL = "reinforcement training from rewards is not supported; preferences are, by `rl: dpo`, `kto` and their own keys"
_REWARD = "reward models are not trained; `rl: dpo` learns from the same pairs of a chosen and a rejected answer"
_ROPE = "long contexts cannot be trained in pieces; raise sequence_len, up to the served model's context"
_OPTIMIZER = "it belongs to an optimizer that is not supported; use adamw_torch_fused, lion or muon, and leave it out"
_SCHEDULE = "it is another way to set the schedule, which is not supported; use lr_scheduler_kwargs"
_LOSS = "it changes the loss in a way that is not supported; leave it out"
_LATER_ADAPTER = "it is not supported yet: adapters are plain LoRA or rsLoRA (peft_use_rslora) on linears"
_CODE = "code of the recipe's is never run; leave it out"

DECISIVE = ("rl", "reward_model", "process_reward_model", "processor_type", "diffusion")
"""Keys that decide about the kind of training: where one is refused, the rest of the recipe need not be looked at."""

_REFUSED: dict[str, Refused] = {
    "lora_modules_to_save": Refused("only low-rank adapters are trained; embeddings and head stay as they are"),
    "lora_model_dir": Refused("a job starts from a fresh adapter; going on from another one is not supported yet"),
    "lora_target_parameters": Refused(
        "parameters of experts that are no linears are not adapted yet; name linears in lora_target_modules"
    ),
    "peft_use_dora": Refused("DoRA is not supported yet; plain LoRA and rsLoRA (peft_use_rslora) are"),
    "peft_init_lora_weights": Refused("adapters begin at zero, as PEFT's by default; leave it out", (True,)),
    "resume_from_checkpoint": Refused("a job resumes from its own checkpoints: POST /admin/jobs/{id}/resume"),
    "eval_causal_lm_metrics": Refused(
        "evaluations report loss and accuracy, and metrics of generated text are not supported yet",
        (["perplexity"],),  # the exponential of the loss
    ),
    "eval_sequence_len": Refused("test rows are held to sequence_len; leave it out"),
    "greater_is_better": Refused("better is a lower loss on the test data; leave it out"),
    "max_packed_sequence_len": Refused("an old name: use sample_packing and sequence_len"),
    "processor_type": Refused(_IMAGES),
    "reward_model": Refused(_REWARD),
    "process_reward_model": Refused(_REWARD),
    "diffusion": Refused("diffusion models are not trained; leave it out, and the model is trained on the next token"),
    "s2_attention": Refused("attention is always over the whole row; leave it out"),
    "use_eaft": Refused("weights of tokens by their entropy are not supported; leave it out"),
    "trainer_cls": Refused(_CODE),
    "added_tokens_overrides": Refused("the vocabulary is the served model's; leave it out"),
    "fix_untrained_tokens": Refused("embeddings stay as they are; leave it out"),
    "peft_trainable_token_indices": Refused("embeddings stay as they are; leave it out"),
    "qat": Refused(
        "training for a later quantisation is not supported; an adapter is trained on the base as served", of=_FULL
    ),
    "curriculum_sampling": Refused("it is at odds with `shuffle_merged_datasets: true`; set one of them"),
    "pretraining_dataset": Refused("it is read as datasets, of which there are some too; set one of them"),
}


def _group(why: str, names: str, *, of: str = "", harmless: tuple[Any, ...] = ()) -> dict[str, Refused]:
    return {name: Refused(why, harmless, of=of) for name in names.split()}


for _key in ("model_config", "overrides_of_model_config", "overrides_of_model_kwargs"):
    _REFUSED[_key] = Refused(_MODEL, parts=_LOADING)
_REFUSED |= _group(_MODEL, "rope_scaling scaling_softmax scaling_softmax_bias scaling_softmax_factor")
_REFUSED |= _group(
    _WHOLE,
    "lisa_n_layers lisa_step_interval lisa_layers_attribute relora relora_cpu_offload relora_prune_ratio "
    "relora_prune_method jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps "
    "use_onebitllms reinit_weights",
    of=_FULL,
)
_REFUSED |= _group(_IMAGES, "processor_kwargs image_size image_resize_algorithm", of="processor_type")
_REFUSED |= _group(_REWARD, "num_labels center_rewards_coefficient", of="reward_model")
_REFUSED |= _group(_RL, "trl vllm ebft", of="rl")
_REFUSED |= _group(_LOSS, "eaft_alpha eaft_k", of="use_eaft")
_REFUSED |= _group("weights by the model's whole distribution (WPO) are not built; leave it out", "dpo_use_weighting")
_REFUSED |= _group(_ROPE, "use_pose pose_max_context_len pose_num_chunks pose_split_on_token_ids")
_REFUSED |= _group(
    _OPTIMIZER,
    "adam_beta3 adam_epsilon2 optim_args optim_target_modules dion_lr dion_momentum dion_rank_fraction "
    "dion_rank_multiple_of qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size "
    "qgalore_proj_quant qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap",
)
_REFUSED |= _group(_SCHEDULE, "eta_min lr_div_factor lr_groups")
_REFUSED |= _group(
    _LATER_ADAPTER,
    "peft lora_alpha_pattern lora_rank_pattern peft_layers_to_transform "
    "peft_layers_pattern peft_layer_replication peft_ensure_weight_tying",
)


# -- datasets' keys --------------------------------------------------------------------------------

_DATASET_NOTED = {
    "no code of a data set is run": "trust_remote_code",
    _READING: "preprocess_shards",
}
_DATASET_REFUSED = {
    "input_format": Refused("rows are read by their fields; use `type: {field_…, format}`"),
    "input_transform": Refused(_CODE),
    "logprobs_field": Refused("learning from a teacher's probabilities is not supported; leave it out"),
    "temperature": Refused("learning from a teacher's probabilities is not supported; leave it out", (1, 1.0)),
}


def _flat(groups: Mapping[str, str], fields: tuple[str, ...]) -> dict[str, str]:
    return {name: why for why, names in groups.items() for name in names.split() if name not in fields}


NOTED: dict[str, str] = _flat(_NOTED, Recipe.__struct_fields__)
REFUSED: dict[str, Refused] = {
    name: refused for name, refused in _REFUSED.items() if name not in Recipe.__struct_fields__
}
DATASET_NOTED: dict[str, str] = _flat(_DATASET_NOTED, Dataset.__struct_fields__)
DATASET_REFUSED: dict[str, Refused] = {
    name: refused for name, refused in _DATASET_REFUSED.items() if name not in Dataset.__struct_fields__
}
