"""The keys of a recipe that do something, once: type, limits, default and a line of documentation.

Names and meaning are Axolotl's, but for `name`, `publish`, `job_weight` and `job_priority`, which are ours. Keys that
are only noted, and refused ones, stand in `keys`. What a key means together with others is checked in `load`
and `types`.
"""

import functools
from typing import Annotated, Any, Literal, get_args, get_type_hints

from msgspec import Meta, Struct, field

from runtime.trainer.recipe.dataset import Dataset, Text
from runtime.trainer.recipe.publish import DEFAULT_GENERATED, GENERATED, Publish, plain_metric, scorer_name
from runtime.trainer.recipe.values import (
    OPTIMIZER_FAMILIES,
    AboveZero,
    AmountOrShare,
    AnswerMetric,
    DpoTerm,
    FsdpConfig,
    LossWeight,
    LrScheduler,
    OptimizerFamily,
    OptimizerName,
    PeftOptions,
    Positive,
    PreferenceMethod,
    Strategy,
    Template,
    UnitShare,
    WholeNumber,
)

DATA_GROUPS = ("datasets", "test_datasets", "generation_datasets")
"""Keys with entries of data."""


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
        key(
            "model",
            '`{when: always}`, `{when: never}`, or a condition, such as `{when: "exact_match > base.exact_match"}`.',
        ),
    ] = field(default_factory=Publish)
    job_weight: Annotated[
        Annotated[float, Meta(gt=0.0, le=1000.0)] | None,
        key("model", "Share of the training time beside other jobs, in relation to theirs. Default: the setting's."),
    ] = None
    job_priority: Annotated[
        int,
        Meta(ge=-100, le=100),
        key("model", "Jobs of a higher priority start first, and beside running ones get all of the training time."),
    ] = 0

    adapter: Annotated[
        Literal["lora", "qlora"] | None,
        key(
            "lora",
            "`lora`, or `qlora`, which is the same here: the base is trained on as it is served. Without, all weights "
            "are trained, on devices of their own.",
        ),
    ] = None
    lora_r: Annotated[int, Meta(ge=1), key("lora", "Rank; at most the setting `adapters.max_lora_rank`.")] = 16
    lora_alpha: Annotated[
        float, Meta(gt=0.0, le=65536.0), key("lora", "The adapter's output is scaled by alpha / rank.")
    ] = 16.0
    lora_rank_pattern: Annotated[
        dict[str, Positive],
        key(
            "lora",
            "Ranks of single linears, as PEFT has them: end of a full name, or a regular expression → rank; the first "
            "key that matches counts.",
        ),
    ] = field(default_factory=dict)
    lora_alpha_pattern: Annotated[
        dict[str, Annotated[float, Meta(gt=0.0, le=65536.0)]], key("lora", "Alphas of single linears, in the same way.")
    ] = field(default_factory=dict)
    lora_dropout: Annotated[float, Meta(ge=0.0, lt=1.0), key("lora", "Dropout on the adapter's input.")] = 0.0
    lora_target_modules: Annotated[
        tuple[Text, ...] | Text | None,
        key("lora", "Linears to adapt: a list of names, one regular expression over full names, or `all-linear`."),
    ] = None
    lora_target_linear: Annotated[
        bool | None, key("lora", "Adapt every linear; so it is without `lora_target_modules`.")
    ] = None
    peft_use_rslora: Annotated[bool, key("lora", "Scale by alpha / sqrt(rank) instead.")] = False
    peft_layers_to_transform: Annotated[
        tuple[WholeNumber, ...] | WholeNumber | None, key("lora", "Layers to adapt, from 0. Default: all.")
    ] = None
    lora_modules_to_save: Annotated[
        tuple[Text, ...],
        key("lora", "Modules of which a whole copy is trained beside: `embed_tokens`, `lm_head`."),
    ] = ()
    peft_trainable_token_indices: Annotated[
        tuple[WholeNumber, ...] | dict[str, tuple[WholeNumber, ...]],
        key(
            "lora",
            "Ids of tokens whose rows of the embedding, and of a tied head, are trained; or by module, "
            "`{embed_tokens: […], lm_head: […]}`.",
        ),
    ] = ()
    peft_ensure_weight_tying: Annotated[
        bool, key("lora", "A tied head follows the copy of the embedding in `lora_modules_to_save`.")
    ] = False
    lora_target_parameters: Annotated[
        tuple[Text, ...] | Text,
        key(
            "lora",
            "Parameters of experts (PEFT's `target_parameters`). Experts are served as they are, so a plan for a model "
            "refuses it; name linears in `lora_target_modules` instead.",
        ),
    ] = ()
    peft_use_dora: Annotated[
        bool,
        key("lora", "DoRA: train the norm of each output's weights beside the low-rank factors."),
    ] = False
    peft_init_lora_weights: Annotated[
        bool | Text,
        key(
            "lora",
            "First weights: `gaussian`, `orthogonal`, `pissa`, `pissa_niter_16`, `olora` or `loftq`, as PEFT has them; "
            "true and false: A uniform, B zero. Adapters of `pissa` and `olora` are published with twice the rank, for "
            "the base as it is.",
        ),
    ] = True
    peft: Annotated[
        PeftOptions | None,
        key(
            "lora",
            "`{loftq_config: {loftq_bits: 4}}`: begin with what rounding took from the served base's weights. Nothing "
            "where it is served in floats.",
        ),
    ] = None
    lora_model_dir: Annotated[
        Text | None,
        key(
            "lora",
            "Adapter to go on from: one of this server, as `name` or `name@version`, or a folder of PEFT's under the "
            "data roots. Ranks, alphas, targets and kind are the adapter's, and may be left out.",
        ),
    ] = None

    datasets: Annotated[tuple[Dataset, ...], Meta(min_length=1, max_length=100), key("data", "What is trained on.")]
    test_datasets: Annotated[
        tuple[Dataset, ...], Meta(max_length=100), key("data", "What is evaluated on; or `val_set_size`.")
    ] = ()
    generation_datasets: Annotated[
        tuple[Dataset, ...],
        Meta(max_length=100),
        key("data", "Rows whose answers are generated and compared in evaluations. Default: the test data."),
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
    shuffle_before_merging_datasets: Annotated[
        bool, key("data", "Shuffle the rows of each dataset; says nothing where the epochs shuffle them all.")
    ] = False
    dataset_shard_num: Annotated[
        Positive | None, key("data", "Cut the rows of all datasets into this number of pieces…")
    ] = None
    dataset_shard_idx: Annotated[WholeNumber | None, key("data", "…and train on one of them, from 0.")] = None
    dataset_exact_deduplication: Annotated[
        bool, key("data", "Drop rows whose tokens are those of another; from the test set, those of training.")
    ] = False
    chat_template: Annotated[
        Text | None,
        key(
            "data",
            "`tokenizer_default` (the served model's own), the name of a built-in one, "
            "`tokenizer_default_fallback_NAME`, or `jinja`. Another one than the model's own goes with the adapter.",
        ),
    ] = None
    chat_template_jinja: Annotated[Template | None, key("data", "Source of the template `jinja`.")] = None
    chat_template_kwargs: Annotated[
        dict[str, bool | int | float | str],
        key(
            "data",
            "Variables of the template, such as `{enable_thinking: false}`. They go with the adapter; a request may "
            "set them otherwise.",
        ),
    ] = field(default_factory=dict)
    default_system_message: Annotated[Text | None, key("data", "System message for the chats that have none.")] = None
    special_tokens: Annotated[
        dict[str, Text | tuple[Text, ...] | None],
        key(
            "data",
            "`eos_token` ends the adapter's texts; it and `additional_special_tokens` are added where the vocabulary "
            "lacks them, as `tokens` are. Others need to be the model's own; the padding token is not needed.",
        ),
    ] = field(default_factory=dict)
    tokens: Annotated[
        tuple[Text, ...] | dict[str, str],
        key("data", "Tokens; rows of new ones, which the vocabulary lacks, are trained and go with the adapter."),
    ] = ()
    added_tokens_overrides: Annotated[
        dict[str, Text],
        key("data", "Id of a reserved token → its text for this adapter; its rows are trained, too."),
    ] = field(default_factory=dict)
    eot_tokens: Annotated[
        tuple[Text, ...], key("data", "Further tokens that end a turn; the vocabulary must have them.")
    ] = ()
    streaming: Annotated[
        bool, key("data", "Read each data set only as far as `max_steps` takes; so it is with `pretraining_dataset`.")
    ] = False
    train_on_inputs: Annotated[bool, key("data", "Train on every token, not on the answers only.")] = False
    sample_packing: Annotated[
        bool, key("data", "Fill each place of a batch with several examples, up to `sequence_len` tokens.")
    ] = False
    sample_packing_sequentially: Annotated[
        bool, key("data", "Fill bins in the order of the rows, not by their lengths.")
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
        OptimizerName,
        key("training", "AdamW, Lion, Adafactor, Muon or SGD by any of their names; others: extra `optimizers`."),
    ] = "adamw_torch_fused"
    lr_scheduler: Annotated[LrScheduler, key("training", "How the learning rate falls after warmup.")] = "cosine"
    cosine_min_lr_ratio: Annotated[
        UnitShare | None, key("training", "Cosine and rex end at this share of the learning rate instead of 0.")
    ] = None
    cosine_constant_lr_ratio: Annotated[
        UnitShare | None, key("training", "The cosine ends at this share of the steps, and what follows is constant.")
    ] = None
    lr_scheduler_kwargs: Annotated[
        dict[str, float],
        key(
            "training",
            "Further options of `lr_scheduler`: `num_cycles`, `power`, `lr_end`, `timescale`, `min_lr`, `min_lr_rate`, "
            "`pct_start`, `div_factor`, `final_div_factor`.",
        ),
    ] = {}
    lr_quadratic_warmup: Annotated[bool, key("training", "Warmup rises with the square of the steps.")] = False
    warmup_steps: Annotated[
        AmountOrShare | None, key("training", "Steps of linear warmup; below 1 a share of all steps.")
    ] = None
    warmup_ratio: Annotated[
        UnitShare | None, key("training", "The same as a share of all steps. Default: 0.03, at most 100 steps.")
    ] = None
    weight_decay: Annotated[UnitShare, key("training", "Decoupled weight decay, times the learning rate.")] = 0.0
    max_grad_norm: Annotated[
        float, Meta(ge=0.0, le=1e6), key("training", "Gradients are clipped to this norm; 0: not at all.")
    ] = 1.0
    adam_beta1: Annotated[float, Meta(ge=0.0, lt=1.0), key("training", "AdamW.")] = 0.9
    adam_beta2: Annotated[float, Meta(ge=0.0, lt=1.0), key("training", "AdamW.")] = 0.999
    adam_epsilon: Annotated[float, Meta(gt=0.0, le=1.0), key("training", "AdamW.")] = 1e-8
    adam_beta3: Annotated[float, Meta(ge=0.0, lt=1.0), key("training", "CAME.")] = 0.9999
    adam_epsilon2: Annotated[float, Meta(gt=0.0, le=1.0), key("training", "CAME.")] = 1e-16
    neftune_noise_alpha: Annotated[
        float,
        Meta(ge=0.0, le=1e3),
        key("training", "Uniform noise on the embeddings while training (NEFTune), 5 to 15 in the paper; 0: none."),
    ] = 0.0
    embedding_lr: Annotated[
        Annotated[float, Meta(gt=0.0, le=1.0)] | None,
        key("training", "Learning rate of rows of embedding and head. Default: as all others'."),
    ] = None
    embedding_lr_scale: Annotated[
        Annotated[float, Meta(gt=0.0, le=1e4)] | None, key("training", "The same, in the learning rate of the others.")
    ] = None
    loraplus_lr_ratio: Annotated[
        Annotated[float, Meta(gt=0.0, le=1e4)] | None,
        key("training", "LoRA+: learning rate of the B matrices, in that of the A matrices."),
    ] = None
    rl: Annotated[
        PreferenceMethod | None,
        key("preferences", "Train on preferences, by this method, instead of on answers."),
    ] = None
    rl_beta: Annotated[
        AboveZero | None,
        key("preferences", "Scale of rewards; orpo: weight of the odds ratio. Default: 0.1."),
    ] = None
    dpo_beta: Annotated[AboveZero | None, key("preferences", "dpo, ipo: another name of `rl_beta`.")] = None
    dpo_loss_type: Annotated[
        tuple[DpoTerm, ...] | None, key("preferences", "dpo: TRL's losses, added up. Default: sigmoid.")
    ] = None
    dpo_loss_weights: Annotated[
        tuple[float, ...] | None, key("preferences", "dpo: weight of each loss of `dpo_loss_type`. Default: 1.")
    ] = None
    dpo_label_smoothing: Annotated[
        Annotated[float, Meta(ge=0.0, lt=0.5)] | None,
        key("preferences", "dpo: share of the pairs that are expected to be the wrong way round."),
    ] = None
    dpo_norm_loss: Annotated[
        bool, key("preferences", "dpo: by means of the answers' tokens instead of sums (sigmoid_norm).")
    ] = False
    rpo_alpha: Annotated[
        LossWeight | None, key("preferences", "dpo, ipo: weight of the chosen answers' likelihood beside (sft).")
    ] = None
    orpo_alpha: Annotated[AboveZero | None, key("preferences", "orpo: another name of `rl_beta`.")] = None
    kto_desirable_weight: Annotated[
        LossWeight | None, key("preferences", "kto: weight of answers that are desirable. Default: 1.")
    ] = None
    kto_undesirable_weight: Annotated[
        LossWeight | None, key("preferences", "kto: weight of answers that are not. Default: 1.")
    ] = None
    cpo_alpha: Annotated[
        LossWeight | None,
        key("preferences", "simpo, cpo: weight of the chosen answers' likelihood beside. Default: 1."),
    ] = None
    simpo_gamma: Annotated[
        LossWeight | None, key("preferences", "simpo: margin of rewards to aim at. Default: 0.5.")
    ] = None
    gradient_checkpointing: Annotated[
        bool, key("training", "Compute activations again in the backward pass instead of keeping them.")
    ] = False
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), key("training", "Of weights, dropout, shuffling and splits.")] = 42
    loss_watchdog_threshold: Annotated[
        AboveZero | None,
        key(
            "training",
            "The job fails when the loss is above this… Default: ln(vocabulary) + 1, worse than guessing.",
        ),
    ] = None
    loss_watchdog_patience: Annotated[Positive, key("training", "…for this number of steps in a row.")] = 3

    eval_strategy: Annotated[
        Strategy | None,
        key("evaluation", "When to evaluate, besides at the end. Default: after each epoch."),
    ] = None
    eval_steps: Annotated[
        AmountOrShare | None, key("evaluation", "Steps between evaluations; below 1 a share of all steps.")
    ] = None
    evals_per_epoch: Annotated[WholeNumber | None, key("evaluation", "Or their number in an epoch.")] = None
    eval_batch_size: Annotated[Positive | None, key("evaluation", "Examples at once. Default: `micro_batch_size`.")] = (
        None
    )
    early_stopping_patience: Annotated[
        Positive | None, key("evaluation", "Stop after this number of evaluations in a row that are no better.")
    ] = None
    metric_for_best_model: Annotated[
        Text,
        key(
            "evaluation",
            "Metric that makes weights the best: `eval_loss`, `accuracy`, `perplexity`, one of preferences or of "
            "generated answers.",
        ),
    ] = "eval_loss"
    greater_is_better: Annotated[
        bool | None, key("evaluation", "Whether a higher value is better. Default: as the metric is meant.")
    ] = None
    load_best_model_at_end: Annotated[
        bool, key("evaluation", "Publish the best evaluated weights; false: the last ones.")
    ] = True
    do_causal_lm_eval: Annotated[
        bool | None,
        key(
            "evaluation",
            "Generate answers to the test data in evaluations, and compare them. Default: where a key names a metric "
            "of generated answers.",
        ),
    ] = None
    eval_causal_lm_metrics: Annotated[
        tuple[AnswerMetric, ...] | None,
        key("evaluation", "How generated answers are compared. Default: exact_match and token_f1."),
    ] = None
    eval_max_new_tokens: Annotated[Positive, key("evaluation", "Most tokens of a generated answer.")] = 128
    eval_table_size: Annotated[
        Annotated[int, Meta(ge=0, le=100)] | None,
        key("evaluation", "Generated answers that the job's events show. Default: 5 where answers are generated."),
    ] = None
    generation_rows: Annotated[Positive, key("evaluation", "Most rows that answers are generated for.")] = 200
    generation_regex: Annotated[
        Text | None, key("evaluation", "Pattern of the metric `regex`, which an answer has to contain.")
    ] = None
    generation_scorers: Annotated[
        tuple[Text, ...],
        Meta(max_length=20),
        key("evaluation", "Scorers of the operator's, `module:function`, that the setting `trainer.scorers` names."),
    ] = ()
    use_tensorboard: Annotated[
        bool, key("evaluation", "Log to TensorBoard's files in the job's folder (extra `tensorboard`).")
    ] = False
    use_wandb: Annotated[
        bool | None, key("evaluation", "Log to a run of Weights & Biases. Default: where `wandb_project` is given.")
    ] = None
    wandb_project: Annotated[
        Text | None,
        key(
            "evaluation",
            "Project of the run, which is recorded offline in the job's folder (extra `wandb`); `wandb sync` sends it.",
        ),
    ] = None
    wandb_entity: Annotated[Text | None, key("evaluation", "Entity of the run.")] = None
    wandb_name: Annotated[Text | None, key("evaluation", "Name of the run. Default: the job's id.")] = None
    wandb_run_id: Annotated[Text | None, key("evaluation", "Id of the run. Default: the job's id.")] = None
    use_mlflow: Annotated[
        bool, key("evaluation", "Log to MLflow's store of files in the job's folder (extra `mlflow`).")
    ] = False
    mlflow_experiment_name: Annotated[Text | None, key("evaluation", "Experiment of the run.")] = None
    mlflow_run_name: Annotated[Text | None, key("evaluation", "Name of the run. Default: the job's id.")] = None
    use_trackio: Annotated[bool, key("evaluation", "Log to trackio's database in the job's folder (extra).")] = False
    trackio_project_name: Annotated[Text | None, key("evaluation", "Project of the run. Default: `eft`.")] = None
    trackio_run_name: Annotated[Text | None, key("evaluation", "Name of the run. Default: the job's id.")] = None
    save_strategy: Annotated[
        Literal["no", "steps", "epoch", "best"] | None,
        key("evaluation", "When to write a checkpoint; best: at each evaluation. Default: after each epoch."),
    ] = None
    save_steps: Annotated[
        AmountOrShare | None, key("evaluation", "Steps between checkpoints; below 1 a share of all steps.")
    ] = None
    saves_per_epoch: Annotated[WholeNumber | None, key("evaluation", "Or their number in an epoch.")] = None
    save_total_limit: Annotated[Positive | None, key("evaluation", "Most checkpoints kept.")] = None

    devices: Annotated[
        Positive | None, key("launched", "Number of devices, of those of the setting `trainer.devices`. Default: all.")
    ] = None
    deepspeed: Annotated[
        Text | dict[str, Any] | None,
        key(
            "launched",
            "DeepSpeed's configuration: the name of a shipped one (`zero1`, `zero2`, `zero3`, …; a path to such a name "
            "is the same), a JSON file that is sent along, or a mapping.",
        ),
    ] = None
    fsdp: Annotated[
        tuple[Text, ...] | Text, key("launched", "Any value: shard over the devices, by FSDP2; `offload` in it counts.")
    ] = ()
    fsdp_config: Annotated[FsdpConfig | None, key("launched", "Options of FSDP2, below.")] = None
    fsdp_version: Annotated[
        Annotated[int, Meta(ge=1, le=2)] | None, key("launched", "FSDP2 is used with either number.")
    ] = None
    ddp: Annotated[
        bool, key("launched", "A copy of the model on each device; so it is without `fsdp` and deepspeed.")
    ] = False
    ddp_timeout: Annotated[
        Positive | None, key("launched", "Seconds that a rank waits for the others. Default: 1800.")
    ] = None
    ddp_bucket_cap_mb: Annotated[Positive | None, key("launched", "ddp: megabytes of gradients in a message.")] = None
    ddp_find_unused_parameters: Annotated[bool, key("launched", "ddp: look for parameters without a gradient.")] = False
    ddp_broadcast_buffers: Annotated[bool, key("launched", "ddp: send buffers before each forward pass.")] = False
    bf16: Annotated[
        bool | Literal["auto", "full"], key("launched", "Compute in bfloat16; auto: where the device has it.")
    ] = False
    fp16: Annotated[
        bool | Literal["auto"], key("launched", "Compute in float16, with a loss scale that follows overflows.")
    ] = False

    notes: tuple[str, ...] = ()
    """Remarks on keys that do nothing here, or something else than they say. Not a key."""
    left_out: tuple[str, ...] = ()
    """Keys of `ADAPTER_KEYS` that were not given. Not a key."""

    @property
    def first_weights(self) -> str:
        """Kind of the adapter's first weights: `peft_init_lora_weights`, "uniform" by default, or loftq by `peft`."""
        loftq, named = self.peft and self.peft.loftq_config, self.peft_init_lora_weights
        return "loftq" if loftq and loftq.loftq_bits else named if isinstance(named, str) else "uniform"

    @property
    def is_made_of_base(self) -> bool:
        """True if the first weights are computed from the base's."""
        return self.begins_in_base or self.first_weights == "loftq"

    @property
    def begins_in_base(self) -> bool:
        """True if the first weights are a part of the base's, beside the rest of which they are trained."""
        return self.first_weights.startswith(("pissa", "olora"))

    @property
    def optimizer_family(self) -> OptimizerFamily:
        """Optimiser that the names of `optimizer` come down to."""
        return OPTIMIZER_FAMILIES.get(self.optimizer, "adamw_8bit")

    @property
    def changes_vocabulary(self) -> bool:
        """True if it names tokens, or rows of embedding and head."""
        tokens = self.tokens or self.special_tokens or self.added_tokens_overrides
        return bool(tokens or self.peft_trainable_token_indices or self.lora_modules_to_save)

    @property
    def answers_per_row(self) -> int:
        """Examples that a row of the data has: 2 for pairs."""
        return 1 if self.rl in (None, "kto") else 2

    @property
    def group_size(self) -> int:
        """Sequences of a row: 2 for preferences, of an answer and another one."""
        return 1 if self.rl is None else 2

    @property
    def effective_batch(self) -> int:
        """Examples, or packed bins, in a step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def evaluates(self) -> bool:
        """True if there is test data."""
        return bool(self.test_datasets or self.generation_datasets) or self.val_set_size > 0

    @property
    def generated_metrics(self) -> tuple[str, ...]:
        """Metrics of generated answers that evaluations compute, each once; none where nothing is generated."""
        if self.do_causal_lm_eval is False:
            return ()
        named = [plain_metric(name) for name in self.eval_causal_lm_metrics or () if name != "perplexity"]
        scorers = [scorer_name(function) for function in self.generation_scorers]
        further = [plain_metric(self.metric_for_best_model), *(one.metric for one in self.publish.metrics)]
        named += [*scorers, *(name for name in further if name in GENERATED)]
        if self.generation_regex is not None:
            named.append("regex")
        if not named and (self.do_causal_lm_eval or self.generation_datasets):
            named += DEFAULT_GENERATED
        return tuple(dict.fromkeys(named))

    @property
    def num_samples(self) -> int:
        """Generated answers that events show."""
        if self.eval_table_size is None or self.do_causal_lm_eval is False:
            return 5 if self.generated_metrics else 0
        return self.eval_table_size

    @property
    def num_generated(self) -> int:
        """Most rows that answers are generated for; 0 where none are."""
        return self.generation_rows if self.generated_metrics else min(self.num_samples, self.generation_rows)

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the tools that the job's numbers are logged to, besides its own log."""
        wandb = self.wandb_project is not None if self.use_wandb is None else self.use_wandb
        asked = {"tensorboard": self.use_tensorboard, "wandb": wandb, "mlflow": self.use_mlflow}
        return tuple(name for name, on in (*asked.items(), ("trackio", self.use_trackio)) if on)

    @property
    def measures_base(self) -> bool:
        """True if the model is evaluated before the first step, too."""
        compared = any(one.scope == "base" for one in self.publish.metrics)
        return self.evaluates and (compared or self.num_generated > 0)


INTERNAL = frozenset({"notes", "left_out"})
"""Fields of a recipe that are no keys."""
ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "lora_target_modules",
    "lora_target_linear",
    "peft_layers_to_transform",
    "peft_use_rslora",
    "peft_use_dora",
)
"""Keys that an adapter to go on from decides."""


@functools.cache
def keys_of(group: str) -> tuple[str, ...]:
    """Names of the recipe's keys in a section of the reference (`model`, `lora`, `data`, …)."""
    hints = get_type_hints(Recipe, include_extras=True)
    return tuple(name for name, hint in hints.items() if any(_in_group(meta, group) for meta in get_args(hint)[1:]))


def _in_group(meta: object, group: str) -> bool:
    return isinstance(meta, Meta) and (meta.extra or {}).get("group") == group
