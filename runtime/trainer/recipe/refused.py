"""Keys of Axolotl that are understood and refused when they are on, each with what is supported instead.

Null and false are off for each of them, so that recipes which spell out their defaults work.
"""

from typing import Any

from msgspec import Struct

OFF: tuple[Any, ...] = (None, False, [], {}, "")


class Refused(Struct, frozen=True):
    """Why a key is refused, and the values that ask for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()
    later: bool = False
    """Nothing speaks against it, but that it is not built."""

    def asks_for_nothing(self, value: Any) -> bool:
        return any(type(value) is type(off) and value == off for off in (*OFF, *self.harmless))


_ONE = Refused("a job trains in the one serving process, on one device; leave it out", (1,))
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
    "deepspeed": _ONE,
    "fsdp": _ONE,
    "fsdp_config": _ONE,
    "fsdp_version": Refused(_ONE.why, (1, 2)),  # says nothing without fsdp_config
    "dp_shard_size": _ONE,
    "dp_replicate_size": _ONE,
    "context_parallel_size": _ONE,
    "tensor_parallel_size": _ONE,
    "ddp": _ONE,
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
