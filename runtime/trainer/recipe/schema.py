"""The keys of a recipe that do something, once: type, limits, default and a line of documentation.

Names and meaning are Axolotl's, but for `name` and `publish`, which are ours. Keys that are only noted stand in
`noted`, those that are refused in `refused`. What a key means together with others is in `checks`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.publish import Publish

LARGEST = 2**31 - 1

Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
Count = Annotated[int, Meta(ge=0, le=LARGEST)]
AboveZero = Annotated[float, Meta(gt=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
AmountOrShare = Annotated[float, Meta(ge=0.0, le=float(LARGEST))]
"""Below 1 a share, from 1 on a whole number."""
Template = Annotated[str, Meta(min_length=1, max_length=65536)]

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "sgd",
]
LrScheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_min_lr_ratio"]
Strategy = Literal["no", "steps", "epoch"]
OptimizerFamily = Literal["adamw", "adamw_8bit", "sgd"]

_FAMILIES: dict[str, OptimizerFamily] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "paged_adamw_32bit": "adamw",
    "sgd": "sgd",
}


def key(group: str, text: str) -> Meta:
    """The line of documentation of a key, and the section of the reference that it stands in."""
    return Meta(description=text, extra={"group": group})


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fine-tuning job. `load_recipe` makes one, checked and with `micro_batch_size` and
    `gradient_accumulation_steps` worked out."""

    base_model: Annotated[
        Text | None, key("model", "The served model: its name, or a hub id or path that ends in it. Default: it.")
    ] = None
    name: Annotated[
        Text | None,
        key(
            "model",
            "Name under which the adapter is published. Default: the last part of `output_dir`, or the job's id.",
        ),
    ] = None
    output_dir: Annotated[
        Text | None,
        key("model", "Only its last part is used, as the default of `name`: the server has a place of its own."),
    ] = None
    publish: Annotated[
        Publish,
        key("model", '`{when: always}`, `{when: never}`, or a condition such as `{when: "eval_loss < 1.5"}`.'),
    ] = field(default_factory=Publish)

    adapter: Annotated[
        Literal["lora", "qlora"],
        key("lora", "`lora`, or `qlora`, which is the same here: the base is trained on as it is served."),
    ]
    lora_r: Annotated[int, Meta(ge=1), key("lora", "Rank; at most the setting `adapters.max_lora_rank`.")] = 16
    lora_alpha: Annotated[
        float, Meta(gt=0.0, le=65536.0), key("lora", "The adapter's output is scaled by alpha / rank.")
    ] = 16.0
    lora_dropout: Annotated[float, Meta(ge=0.0, lt=1.0), key("lora", "Dropout on the adapter's input.")] = 0.0
    lora_target_modules: Annotated[
        tuple[Text, ...] | Text | None,
        key("lora", "Linears to adapt: a list of names, one regular expression over full names, or `all-linear`."),
    ] = None
    lora_target_linear: Annotated[
        bool | None, key("lora", "Adapt every linear; so it is without `lora_target_modules`.")
    ] = None
    peft_use_rslora: Annotated[bool, key("lora", "Scale by alpha / sqrt(rank) instead.")] = False

    datasets: Annotated[tuple[Dataset, ...], Meta(min_length=1, max_length=100), key("data", "What is trained on.")]
    test_datasets: Annotated[
        tuple[Dataset, ...], Meta(max_length=100), key("data", "What is evaluated on; or `val_set_size`.")
    ] = ()
    val_set_size: Annotated[
        AmountOrShare, key("data", "Rows held out for evaluation: below 1 a share of them, else their number.")
    ] = 0.0
    sequence_len: Annotated[Positive, key("data", "Most tokens of an example, and of a packed bin.")] = 512
    excess_length_strategy: Annotated[
        Literal["drop", "truncate", "raise"], key("data", "What happens to rows that are longer than `sequence_len`.")
    ] = "drop"
    min_sample_len: Annotated[Positive, key("data", "Rows with fewer tokens are dropped.")] = 2
    shuffle_merged_datasets: Annotated[
        bool, key("data", "Each epoch goes through the rows in another order; false keeps the files' order.")
    ] = True
    dataset_exact_deduplication: Annotated[
        bool, key("data", "Drop rows whose tokens are those of another; from the test set, those of training.")
    ] = False
    chat_template: Annotated[
        Text | None,
        key("data", "`tokenizer_default`, or the name of what the served model's template is, such as `chatml`."),
    ] = None
    chat_template_jinja: Annotated[
        Template | None, key("data", "Accepted where it is the served model's own template.")
    ] = None
    default_system_message: Annotated[Text | None, key("data", "System message for the chats that have none.")] = None
    special_tokens: Annotated[
        dict[str, str], key("data", "Accepted where they are the model's own; the padding token is not needed.")
    ] = field(default_factory=dict)
    tokens: Annotated[
        tuple[Text, ...] | dict[str, str], key("data", "Accepted where the vocabulary has them already.")
    ] = ()
    eot_tokens: Annotated[
        tuple[Text, ...], key("data", "Further tokens that end a turn; the vocabulary must have them.")
    ] = ()
    train_on_inputs: Annotated[bool, key("data", "Train on every token, not on the answers only.")] = False
    sample_packing: Annotated[
        bool, key("data", "Fill each place of a batch with several examples, up to `sequence_len` tokens.")
    ] = False
    group_by_length: Annotated[bool, key("data", "Put examples of like length into a batch.")] = False

    micro_batch_size: Annotated[Positive, key("training", "Examples (packed: bins) computed at once.")] = 1
    gradient_accumulation_steps: Annotated[Positive, key("training", "Micro-batches in a step.")] = 1
    batch_size: Annotated[
        Positive | None, key("training", "Examples in a step, micro × accumulation; in place of either of them.")
    ] = None
    num_epochs: Annotated[
        float, Meta(gt=0.0, le=10_000.0), key("training", "Passes over the data; may be a fraction.")
    ] = 1.0
    max_steps: Annotated[Positive | None, key("training", "Number of steps, whatever `num_epochs` says.")] = None
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0), key("training", "The highest learning rate.")]
    optimizer: Annotated[
        Optimizer, key("training", "AdamW in 32 or 8 bits, or plain SGD; names that mean the same are the same.")
    ] = "adamw_torch_fused"
    lr_scheduler: Annotated[LrScheduler, key("training", "How the learning rate falls after warmup.")] = "cosine"
    cosine_min_lr_ratio: Annotated[
        Share | None, key("training", "The cosine ends at this share of the learning rate instead of 0.")
    ] = None
    warmup_steps: Annotated[
        AmountOrShare | None, key("training", "Steps of linear warmup; below 1 a share of all steps.")
    ] = None
    warmup_ratio: Annotated[
        Share | None, key("training", "The same as a share of all steps. Default: 0.03, at most 100 steps.")
    ] = None
    weight_decay: Annotated[Share, key("training", "Decoupled weight decay, times the learning rate.")] = 0.0
    max_grad_norm: Annotated[
        float, Meta(ge=0.0, le=1e6), key("training", "Gradients are clipped to this norm; 0: not at all.")
    ] = 1.0
    adam_beta1: Annotated[float, Meta(ge=0.0, lt=1.0), key("training", "AdamW.")] = 0.9
    adam_beta2: Annotated[float, Meta(ge=0.0, lt=1.0), key("training", "AdamW.")] = 0.999
    adam_epsilon: Annotated[float, Meta(gt=0.0, le=1.0), key("training", "AdamW.")] = 1e-8
    gradient_checkpointing: Annotated[
        bool, key("training", "Compute activations again in the backward pass instead of keeping them.")
    ] = False
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), key("training", "Of weights, dropout, shuffling and splits.")] = 42
    loss_watchdog_threshold: Annotated[
        AboveZero | None, key("training", "The job fails when the loss is above this…")
    ] = None
    loss_watchdog_patience: Annotated[Positive, key("training", "…for so many steps in a row.")] = 3

    eval_strategy: Annotated[
        Strategy | None,
        key("evaluation", "When to evaluate, besides at the end. Default: after each epoch."),
    ] = None
    eval_steps: Annotated[
        AmountOrShare | None, key("evaluation", "Steps between evaluations; below 1 a share of all steps.")
    ] = None
    evals_per_epoch: Annotated[Count | None, key("evaluation", "Or so many in an epoch.")] = None
    eval_batch_size: Annotated[Positive | None, key("evaluation", "Examples at once. Default: `micro_batch_size`.")] = (
        None
    )
    early_stopping_patience: Annotated[
        Positive | None, key("evaluation", "Stop after so many evaluations in a row that are no better.")
    ] = None
    metric_for_best_model: Annotated[
        Literal["eval_loss", "loss"], key("evaluation", "What better means: a lower loss on the test data.")
    ] = "eval_loss"
    load_best_model_at_end: Annotated[
        bool, key("evaluation", "The best evaluated weights are published, so only true is accepted with test data.")
    ] = True
    save_strategy: Annotated[
        Literal["no", "steps", "epoch", "best"] | None,
        key("evaluation", "When to write a checkpoint; best: at each evaluation. Default: after each epoch."),
    ] = None
    save_steps: Annotated[
        AmountOrShare | None, key("evaluation", "Steps between checkpoints; below 1 a share of all steps.")
    ] = None
    saves_per_epoch: Annotated[Count | None, key("evaluation", "Or so many in an epoch.")] = None
    save_total_limit: Annotated[Positive | None, key("evaluation", "Most checkpoints kept.")] = None

    notes: tuple[str, ...] = ()
    """What was accepted and does nothing here, and what means something else than it says. Not a key."""

    @property
    def optimizer_family(self) -> OptimizerFamily:
        """What the names of `optimizer` come down to."""
        return _FAMILIES.get(self.optimizer, "adamw_8bit")

    @property
    def effective_batch(self) -> int:
        """Examples, or packed bins, in a step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def evaluates(self) -> bool:
        """Whether there is test data."""
        return bool(self.test_datasets) or self.val_set_size > 0
