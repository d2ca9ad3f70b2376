"""Recipes as people write them, and every way in which they can be wrong."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ModelNotFound
from runtime.trainer.recipe import Dataset, Document, Recipe, RecipeError, adapter_name, load_recipe, recipe_from
from runtime.trainer.recipe.keys import DATASET_NOTED, DATASET_REFUSED, NOTED, REFUSED, RENAMED
from runtime.trainer.recipe.schema import INTERNAL
from tests.trainer.recipe.acceptance import check_folder, report

BASIC: dict[str, Any] = {"adapter": "lora", "learning_rate": 2e-4, "datasets": [{"path": "a.jsonl"}]}

QLORA = """
base_model: NousResearch/SmolLM2-135M-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
trust_remote_code: false
load_in_8bit: false
load_in_4bit: true
strict: false
push_dataset_to_hub:
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
saves_per_epoch: 1
debug:
deepspeed:
fsdp:
fsdp_config:
weight_decay: 0.0
special_tokens:
  pad_token: "<|endoftext|>"
"""

CHAT = """
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
cut_cross_entropy: true
chat_template: chatml
datasets:
  - path: chats.json
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles:
      user: [human, user]
      assistant: gpt
    roles_to_train: [assistant]
    train_on_eos: turn
eot_tokens: ["<|im_end|>"]
adapter: lora
lora_target_modules: 'model.layers.[\\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj'
learning_rate: 2e-5
optimizer: adamw_bnb_8bit
gradient_checkpointing: offload
warmup_steps: 0.1
max_steps: 50
num_epochs: 1
load_in_8bit: true
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
"""


def make(**keys: Any) -> Recipe:
    return recipe_from(Document({**BASIC, **keys}), max_lora_rank=64)


def problems(**keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        make(**keys)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_a_qlora_recipe_of_axolotls_kind() -> None:
    recipe = load_recipe(QLORA.encode(), max_lora_rank=64, served=["SmolLM2-135M-Instruct"])
    assert recipe.learning_rate == 2e-4
    assert recipe.effective_batch == 8
    assert recipe.optimizer_family == "adamw"
    assert recipe.gradient_checkpointing is True
    assert recipe.datasets[0].type == "alpaca"
    assert adapter_name(recipe, "job-1") == "qlora-out"
    noted = {note.split()[0] for note in recipe.notes}
    assert noted == {
        "model_type", "tokenizer_type", "bf16", "load_in_4bit", "attn_implementation", "gradient_checkpointing_kwargs",
        "logging_steps", "pad_to_sequence_len", "dataset_prepared_path",
    }  # fmt: skip


def test_a_chat_recipe_of_axolotls_kind() -> None:
    recipe = load_recipe(CHAT.encode(), max_lora_rank=64)
    entry = recipe.datasets[0]
    assert entry.properties == {"role": "from", "content": "value"}
    assert entry.roles == {"user": ("human", "user"), "assistant": "gpt"}
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.optimizer_family) == (2e-5, 0.1, "adamw_8bit")
    notes = "\n".join(recipe.notes)
    for part in ("plugins", "liger_rope", "load_in_8bit", "max_steps (50) decides", "offload is true here", "8 bits"):
        assert part in notes


SHAREGPT = """
adapter: lora
learning_rate: 1e-4
datasets:
  - path: chats.jsonl
    ds_type: json
    {lines}
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("type: sharegpt", {}),
        ("type: sharegpt\n    conversation: chatml", {"chat_template": "chatml"}),
        ("type: sharegpt\n    conversation: llama-3", {"chat_template": "llama_3"}),
        ("type: sharegpt\n    field: talk", {"field_messages": "talk"}),
        ("type: sharegpt:chat\n    field_messages: talk", {"field_messages": "talk"}),
        (
            "type: sharegpt\n    roles: {input: [kunde], output: wir}",
            {"roles": {"user": ("kunde",), "assistant": "wir"}},
        ),
        (
            "type: sharegpt\n    field_human: me\n    field_model: it",
            {"roles": {"user": ("me",), "assistant": ("it",)}},
        ),
        ("type: sharegpt.load_role", {"message_property_mappings": {"role": "role", "content": "value"}}),
        ("type: sharegpt.load_guanaco", {"message_property_mappings": {"role": "role", "content": "text"}}),
        (
            "type: sharegpt.load_ultrachat",
            {
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
            },
        ),
    ],
)
def test_sharegpt_is_read_as_what_it_is_called_today(lines: str, expected: dict[str, Any]) -> None:
    recipe = load_recipe(SHAREGPT.replace("{lines}", lines).encode(), max_lora_rank=64)
    modern = {
        "path": "chats.jsonl",
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        **expected,
    }
    assert recipe.datasets == (Dataset(**modern),)
    (note,) = recipe.notes
    assert note.startswith("datasets[0]: type sharegpt")
    # The lines in the note are those of the recipe in its modern form.
    given = "".join(f"    {line}\n" for line in re.findall("`([^`]*)`", note))
    again = SHAREGPT.replace("    {lines}\n", given)
    assert load_recipe(again.encode(), max_lora_rank=64).datasets == recipe.datasets


def test_thousands_of_unknown_keys_take_no_second() -> None:
    """Each was compared with every known key before: 33 ms for one."""
    text = "".join(f"lora_learning_rate_schedul{number:04d}: 1\n" for number in range(3500))
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(text.encode(), max_lora_rank=64)
    assert time.process_time() - began < 2
    assert len(caught.value.problems) > 3500
    assert caught.value.message.count("\n") < 60


def test_all_problems_come_at_once_with_their_lines() -> None:
    text = (
        "learning_rate: .nan\nadapter: lora\ndatasets:\n  - path: a\n    typ: alpaca\nlora_r: 1000000000\n"
        "optimizer: adamw_torh\nlearning_rte: 3\nwarmup_ratio: 0.1\nwarmup_steps: 3\nuse_pose: true\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(text.encode(), max_lora_rank=64)
    found = {(problem.key, problem.line) for problem in caught.value.problems}
    assert found == {
        ("learning_rate", 1), ("datasets[0].typ", 5), ("lora_r", 6), ("optimizer", 7), ("learning_rte", 8),
        ("warmup_ratio", 9), ("use_pose", 11),
    }  # fmt: skip
    assert caught.value.param == "learning_rate"
    assert "did you mean adamw_torch?" in caught.value.message
    assert "unknown key; did you mean learning_rate?" in caught.value.message
    assert "lora_r, line 6: must be at most 64 (adapters.max_lora_rank), got 1000000000" in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0, 1e9, -1e-4, "fast", True, [1e-4]])
def test_learning_rates_that_make_no_sense(value: Any) -> None:
    assert "expected a number above 0 and at most 1" in problems(learning_rate=value)["learning_rate"]


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"adapter": None}, "adapter", "needs devices of its own"),
        ({"adapter": "llama-adapter"}, "adapter", "one of lora, qlora"),
        ({"datasets": None}, "datasets", "is missing"),
        ({"datasets": []}, "datasets", "1 to 100 entries, got 0"),
        ({"datasets": "a.jsonl"}, "datasets", "list of mappings"),
        ({"datasets": [{"type": "alpaca"}]}, "datasets[0].path", "is missing"),
        ({"datasets": [{"path": "a", "type": "sharegpt.load_x"}]}, "datasets[0].type", "chat_template, "),
        ({"datasets": [{"path": "a", "conversation": "chatml"}]}, "datasets[0].conversation", "unknown key"),
        (
            {"datasets": [{"path": "a", "roles_to_train": ["nobody"]}]},
            "datasets[0].roles_to_train",
            "'nobody' is no role; known are assistant, bot, ",
        ),
        (
            {"test_datasets": [{"path": "a", "roles": {"wizard": ["kim"]}}]},
            "test_datasets[0].roles",
            "'wizard' is no role; there are system, developer, user, assistant, tool",
        ),
        (
            {"datasets": [{"path": "a", "train_on_eos": "all", "train_on_eot": "turn"}]},
            "datasets[0].train_on_eot",
            "equal",
        ),
        ({"lora_r": 0}, "lora_r", "of at least 1, got 0"),
        ({"lora_r": 65}, "lora_r", "at most 64"),
        ({"lora_r": 8.5}, "lora_r", "a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout", "below 1"),
        ({"lora_alpha": 0}, "lora_alpha", "above 0"),
        ({"lora_target_linear": False}, "lora_target_linear", "nothing to train"),
        ({"lora_target_modules": "(q_proj"}, "lora_target_modules", "no regular expression"),
        ({"num_epochs": 0}, "num_epochs", "above 0"),
        ({"max_steps": 0}, "max_steps", "at least 1"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"val_set_size": 1.5}, "val_set_size", "whole number, or a share below 1"),
        ({"val_set_size": -0.1}, "val_set_size", "at least 0"),
        ({"val_set_size": 0.1, "test_datasets": [{"path": "b"}]}, "test_datasets", "not both"),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_ratio", "not both"),
        ({"save_steps": 10, "saves_per_epoch": 1}, "saves_per_epoch", "not both"),
        ({"eval_steps": 10, "evals_per_epoch": 1, "val_set_size": 2}, "evals_per_epoch", "not both"),
        ({"eval_strategy": "steps", "val_set_size": 2}, "eval_strategy", "needs eval_steps"),
        ({"eval_strategy": "no", "eval_steps": 3, "val_set_size": 2}, "eval_steps", "no meaning"),
        ({"save_strategy": "epoch", "save_steps": 3}, "save_steps", "no meaning"),
        ({"early_stopping_patience": 3}, "early_stopping_patience", "needs test data"),
        ({"metric_for_best_model": "eval_accuracy"}, "metric_for_best_model", "needs test data"),
        ({"save_strategy": "best"}, "save_strategy", "needs test data"),
        ({"publish": {"when": "eval_loss < 1.5"}}, "publish.when", "needs test data"),
        ({"publish": {"when": "loss is low"}}, "publish.when", "always, never, or a condition"),
        ({"publish": {"whne": "always"}}, "publish.whne", "did you mean when?"),
        ({"publish": "always"}, "publish", "a mapping"),
        ({"sample_packing": True, "group_by_length": True}, "group_by_length", "no meaning with sample_packing"),
        ({"min_sample_len": 600}, "min_sample_len", "at most sequence_len (512)"),
        ({"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}, "cosine_min_lr_ratio", "cosine"),
        ({"lr_scheduler": "cosine_min_lr_ratio"}, "cosine_min_lr_ratio", "is missing"),
        ({"chat_template": "jinja"}, "chat_template_jinja", "is missing"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages", "no variable"),
        ({"chat_template_kwargs": {"a b": True}}, "chat_template_kwargs.a b", "no variable"),
        ({"chat_template_kwargs": {"a": ["b"]}}, "chat_template_kwargs", "a mapping"),
        ({"name": "../x"}, "name", "letters, digits"),
        ({"name": "x" * 300}, "name", "1 to 128"),
        ({"name": "ﬁn"}, "name", "letters, digits"),
        ({"batch_size": 7, "micro_batch_size": 2}, "batch_size", "whole numbers that agree"),
        ({"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2}, "batch_size", "2 × 2 = 4"),
        ({"train_on_inputs": "maybe"}, "train_on_inputs", "true or false, got 'maybe'"),
        ({"model_config": {"use_cache": False, "rope_theta": 1}}, "model_config", "the served one"),
        ({"curriculum_sampling": True, "shuffle_merged_datasets": True}, "curriculum_sampling", "at odds"),
        ({"pretraining_dataset": [{"path": "b"}]}, "pretraining_dataset", "set one of them"),
        ({"datasets": [{"path": "a", "input_transform": "x"}]}, "datasets[0].input_transform", "never run"),
        ({"dataset_shard_num": 2}, "dataset_shard_num", "both, or neither"),
        ({"dataset_shard_num": 2, "dataset_shard_idx": 2}, "dataset_shard_idx", "below dataset_shard_num (2)"),
        ({"rl": "grpo"}, "rl", "Collect answers"),
        ({"embedding_lr": 1e-5, "embedding_lr_scale": 0.1}, "embedding_lr_scale", "not both"),
        ({"peft_use_dora": True, "peft_init_lora_weights": "pissa"}, "peft_use_dora", "first weights from pissa"),
        ({"peft_init_lora_weights": "pisa"}, "peft_init_lora_weights", "did you mean pissa?"),
        ({"peft_init_lora_weights": "eva"}, "peft_init_lora_weights", "use pissa, gaussian, or leave it out"),
        ({"peft_init_lora_weights": "olora", "lora_r": 40}, "lora_r", "at most 32 with olora"),
        ({"peft_init_lora_weights": "orthogonal", "lora_r": 5}, "peft_init_lora_weights", "an even lora_r, got 5"),
        (
            {"peft_init_lora_weights": "orthogonal", "lora_rank_pattern": {"q_proj": 3}},
            "peft_init_lora_weights",
            "an even lora_rank_pattern.q_proj, got 3",
        ),
        ({"lora_rank_pattern": {"q_proj": 65}}, "lora_rank_pattern.q_proj", "at most 64 (adapters.max_lora_rank)"),
        ({"lora_rank_pattern": {"q_proj": 0}}, "lora_rank_pattern", "expected a mapping of keys to values"),
        ({"lora_rank_pattern": {"(a+)+$": 4}}, "lora_rank_pattern", "has the key '(a+)+$', too complex"),
        ({"lora_alpha_pattern": {"[": 4}}, "lora_alpha_pattern", "has the key '[', no regular expression"),
        ({"peft": {"loftq_config": {"loftq_bits": 9}}}, "peft.loftq_config.loftq_bits", "got 9"),
        ({"peft": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}}, "peft.loftq_config.loftq_iter", "must be 1"),
        ({"peft": {"r": 4}}, "peft.r", "unknown key"),
        (
            {"peft": {"loftq_config": {"loftq_bits": 4}}, "peft_init_lora_weights": "pissa"},
            "peft_init_lora_weights",
            "asks for loftq",
        ),
        (
            {"peft": {"loftq_config": {"loftq_bits": 4}}, "lora_model_dir": "newt"},
            "peft",
            "the first weights are the adapter's",
        ),
        ({"context_paralel_size": 2}, "context_paralel_size", "did you mean context_parallel_size?"),
        ({"adam_eps": 1e-9, "adam_epsilon": 1e-8}, "adam_eps", "did you mean adam_epsilon?"),
        ({"notes": ["x"]}, "notes", "unknown key"),
        ({"x" * 10_000: 1}, "x" * 64, "unknown key"),
    ],
)
def test_one_problem(keys: dict[str, Any], key: str, message: str) -> None:
    found = problems(**keys)
    assert list(found) == [key]
    assert message in found[key]


@pytest.mark.parametrize(
    ("keys", "micro", "accumulation"),
    [
        ({}, 1, 1),
        ({"batch_size": 8, "micro_batch_size": 2}, 2, 4),
        ({"batch_size": 8, "gradient_accumulation_steps": 4}, 2, 4),
        ({"batch_size": 8}, 1, 8),
        ({"batch_size": 8, "micro_batch_size": 4, "gradient_accumulation_steps": 2}, 4, 2),
    ],
)
def test_batch_sizes(keys: dict[str, Any], micro: int, accumulation: int) -> None:
    recipe = make(**keys)
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps) == (micro, accumulation)


def test_words_and_texts_where_their_meaning_is_clear() -> None:
    recipe = make(sample_packing="on", train_on_inputs="no", learning_rate="2e-5", sequence_len="1_024", max_steps=5.0)
    assert recipe.sample_packing is True
    assert recipe.train_on_inputs is False
    assert (recipe.learning_rate, recipe.sequence_len, recipe.max_steps) == (2e-5, 1024, 5)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_is_accepted_when_it_is_off(key: str) -> None:
    for off in (None, False, [], {}):
        assert make(**{key: off}) == make()
    assert list(problems(**{key: {"something": "on"}})) == [key]


@pytest.mark.parametrize("key", NOTED)
def test_what_is_noted_changes_nothing(key: str) -> None:
    for value in (True, "something", 3, [1], {"a": None}):
        recipe = make(**{key: value})
        assert len(recipe.notes) == 1
        assert recipe.notes[0].startswith(f"{key} is ignored: ")
    for off in (None, False):
        assert make(**{key: off}) == make()


@pytest.mark.parametrize("key", DATASET_REFUSED)
def test_a_key_of_a_dataset_that_is_refused(key: str) -> None:
    assert make(datasets=[{"path": "a.jsonl", key: None}]) == make()
    assert list(problems(datasets=[{"path": "a.jsonl", key: "something"}])) == [f"datasets[0].{key}"]


@pytest.mark.parametrize("key", DATASET_NOTED)
def test_a_key_of_a_dataset_that_is_noted(key: str) -> None:
    recipe = make(test_datasets=[{"path": "b.jsonl", key: True}])
    assert recipe.notes == (f"test_datasets[0].{key} is ignored: {DATASET_NOTED[key]}.",)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_older_names_are_read_as_todays(old: str, new: str) -> None:
    samples: dict[str, Any] = {"eval_strategy": "no", "adam_epsilon": 1e-6}
    value = samples.get(new, 3)
    if new in REFUSED:
        assert list(problems(**{old: value})) == [new]
        return
    recipe = make(**{old: value})
    assert f"{old} is an older name; it is read as `{new}: {value}`." in recipe.notes
    if new in samples:
        assert getattr(recipe, new) == value


def test_keys_that_are_read_as_others() -> None:
    recipe = make(curriculum_sampling=True)
    assert recipe.shuffle_merged_datasets is False
    recipe = make(datasets=None, pretraining_dataset=[{"path": "a.jsonl", "type": "pretrain", "text_column": "body"}])
    assert recipe.datasets == (Dataset(path="a.jsonl", type="completion", field="body"),)
    assert make(datasets=None, pretraining_dataset="a.jsonl").datasets[0].field == "text"


@pytest.mark.parametrize(
    "key", sorted(set(Recipe.__struct_fields__) - INTERNAL - {"adapter", "learning_rate", "datasets"})
)
@pytest.mark.parametrize("off", [None, "", [], {}, False])
def test_empty_values_never_stop_a_recipe(key: str, off: Any) -> None:
    if key in ("lora_target_linear", "load_best_model_at_end") and off is False:
        return  # false says something there
    make(**{key: off})


@pytest.mark.parametrize(
    ("keys", "key", "way_out"),
    [
        ({"adapter": None, "deepspeed": "z3.json", "cosine_constant_lr_ratio": 0.1}, "adapter", "`adapter: lora`"),
        ({"adapter": None, "lisa_n_layers": 4, "lisa_step_interval": 20}, "adapter", "`adapter: lora`"),
        ({"adapter": None, "qat": {"weight_dtype": "int4"}, "lora_r": None}, "adapter", "`adapter: lora`"),
        ({"reward_model": True, "num_labels": 1, "datasets": [{"path": "a", "type": "bradley_terry.chat_template"}]},
         "reward_model", "`rl: dpo`"),
        ({"rl": "ebft", "ebft": {"n": 1}, "trl": {"beta": 0.1}, "adapter": None}, "rl", ""),
        ({"processor_type": "AutoProcessor", "image_size": 512, "skip_prepare_dataset": True}, "processor_type",
         "rows of text"),
        ({"diffusion": {"noise_schedule": "cosine"}, "adapter": None}, "diffusion", "next token"),
    ],
)  # fmt: skip
def test_another_kind_of_training_is_one_problem(keys: dict[str, Any], key: str, way_out: str) -> None:
    found = problems(**keys)
    assert list(found) == [key]
    assert way_out in found[key]


COMBINATIONS: list[dict[str, Any]] = [
    {"deepspeed": "zero2.json", "use_ray": True, "ray_num_workers": 4, "gradient_checkpointing": "offload_disk"},
    {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"offload_params": True}, "fsdp_version": 2},
    {"trust_remote_code": True, "load_in_8bit": True, "lora_fan_in_fan_out": True, "fp16": True},
    {"gptq": True, "gptq_disable_exllama": True, "float16": True, "adam_eps": 1e-5, "special_tokens": {"a": "b"}},
    {"model_config": {"output_router_logits": True}, "unfrozen_parameters": ["^lm_head.*"], "adapter": "qlora"},
    {"expert_parallel_size": 8, "use_sonicmoe": True, "dp_shard_size": 1, "context_parapllel_size": 2},
    {"use_otel_metrics": True, "otel_metrics_port": 8000, "swanlab_mode": "cloud", "trackio_space_id": "x"},
    {"curriculum_sampling": True, "sample_packing": True, "sample_packing_sequentially": True, "test_value": True},
    {"pretrain_multipack_attn": True, "streaming": True, "max_steps": 9, "plugins": ["a.B"], "strict": False},
]
"""Keys as recipes for LoRA combine them."""


@pytest.mark.parametrize("keys", COMBINATIONS)
def test_combinations_that_only_say_how(keys: dict[str, Any]) -> None:
    assert make(**keys).notes


@pytest.mark.parametrize("base", [None, "Tiny", "tiny", "someone/TINY", "/models/tiny/", "alias"])
def test_the_served_model_by_any_of_its_names(base: str | None) -> None:
    document = Document({**BASIC, "base_model": base})
    assert recipe_from(document, max_lora_rank=64, served=["Tiny", "alias"]).base_model == base


@pytest.mark.parametrize("base", ["tiny-2", "tiny/other", "other"])
def test_another_model_is_not_found(base: str) -> None:
    with pytest.raises(ModelNotFound, match="serves 'Tiny'") as caught:
        recipe_from(Document({**BASIC, "base_model": base}), max_lora_rank=64, served=["Tiny"])
    assert (caught.value.status, caught.value.param) == (404, "base_model")


def test_names_of_adapters() -> None:
    assert adapter_name(make(name="a", output_dir="./outputs/b"), "job") == "a"
    assert adapter_name(make(output_dir="./outputs/b/"), "job") == "b"
    assert adapter_name(make(output_dir="./ü/.."), "job") == "job"
    assert adapter_name(make(), "job") == "job"


@pytest.mark.parametrize(
    ("when", "metrics", "published"),
    [
        ("always", {}, True),
        ("never", {"eval_loss": 0.0}, False),
        ("eval_loss < 1.5", {"eval_loss": 1.4}, True),
        ("eval_loss<1.5", {"eval_loss": 1.5}, False),
        ("eval_loss <= 1.5", {"eval_loss": 1.5}, True),
        ("eval_accuracy >= 9e-1", {"eval_accuracy": 0.95}, True),
        ("eval_loss < 1.5", {"eval_loss": float("nan")}, False),
        ("eval_loss < 1.5", {}, False),
    ],
)
def test_the_gate(when: str, metrics: dict[str, float], published: bool) -> None:
    recipe = make(publish={"when": when}, val_set_size=1)
    assert recipe.publish.decide(metrics)[0] is published


def test_the_recipe_encodes() -> None:
    import msgspec

    recipe = load_recipe(CHAT.encode(), max_lora_rank=64)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe


def test_a_folder_of_recipes_is_counted_by_class(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lora.yml").write_text(QLORA)
    (tmp_path / "full.yaml").write_text(QLORA.replace("adapter: qlora", "adapter:").replace("lora_", "# lora_"))
    table = tmp_path / "classes.csv"
    table.write_text("file,adapter,objective,modality\nsub/lora.yml,qlora,sft,text\nfull.yaml,full,sft,text\n")
    assert list(report(list(check_folder(tmp_path, table)), refused=False)) == [
        "adapter, sft, text: 1 of 1 accepted, 0 refused with one sentence",
        "all weights, sft, text: 0 of 1 accepted, 1 refused with one sentence",
    ]
