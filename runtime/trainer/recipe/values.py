"""Types of the values of a recipe's keys: numbers within limits, names, and mappings of a few options."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from runtime.trainer.recipe.dataset import Text, entry


class FsdpConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of FSDP2; the prefix `fsdp_` of a key makes no difference."""

    offload_params: Annotated[bool, entry("Keep parameters and the optimiser's state on the CPU.")] = False
    reshard_after_forward: Annotated[
        bool, entry("Drop gathered parameters after the forward pass, and gather them again for the backward pass.")
    ] = True
    activation_checkpointing: Annotated[bool, entry("As `gradient_checkpointing`.")] = False
    transformer_layer_cls_to_wrap: Annotated[
        Text | None, entry("Classes of layers, comma-separated. Default: as transformers names them for the model.")
    ] = None
    sharding_strategy: Annotated[
        Text | int | None, entry("The older way: `SHARD_GRAD_OP` is `reshard_after_forward: false`.")
    ] = None


LARGEST = 2**31 - 1

Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
WholeNumber = Annotated[int, Meta(ge=0, le=LARGEST)]
AboveZero = Annotated[float, Meta(gt=0.0)]
UnitShare = Annotated[float, Meta(ge=0.0, le=1.0)]
LossWeight = Annotated[float, Meta(ge=0.0, le=1e3)]
AmountOrShare = Annotated[float, Meta(ge=0.0, le=float(LARGEST))]
"""Below 1 a share, from 1 on a whole number."""
Template = Annotated[str, Meta(min_length=1, max_length=65536)]

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw",
    "optimi_adamw",
    "ao_adamw_8bit",
    "ao_adamw_4bit",
    "ao_adamw_fp8",
    "lion",
    "lion_32bit",
    "lion_8bit",
    "lion_pytorch",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adafactor",
    "muon",
    "came_pytorch",
    "adopt_adamw",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
]
LrScheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_min_lr_ratio",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "one_cycle",
    "rex",
]
Strategy = Literal["no", "steps", "epoch"]
AnswerMetric = Literal[
    "perplexity",
    "exact_match",
    "token_f1",
    "bleu",
    "sacrebleu",
    "chrf",
    "ter",
    "rouge_l",
    "regex",
    "json_valid",
    "tool_call",
]
PreferenceMethod = Literal["dpo", "ipo", "orpo", "kto", "simpo", "cpo"]
DpoTerm = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "sigmoid_norm",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sft",
]
OptimizerFamily = Literal[
    "adamw",
    "adamw_8bit",
    "sgd",
    "lion",
    "adafactor",
    "muon",
    "came",
    "adopt",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
]

OPTIMIZER_FAMILIES: dict[str, OptimizerFamily] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
    "optimi_adamw": "adamw",
    "lion": "lion",
    "lion_32bit": "lion",
    "lion_8bit": "lion",
    "lion_pytorch": "lion",
    "paged_lion_32bit": "lion",
    "paged_lion_8bit": "lion",
    "adafactor": "adafactor",
    "muon": "muon",
    "came_pytorch": "came",
    "adopt_adamw": "adopt",
    "schedule_free_adamw": "schedule_free_adamw",
    "schedule_free_radam": "schedule_free_radam",
    "schedule_free_sgd": "schedule_free_sgd",
    "sgd": "sgd",
}
"""Optimiser → what is computed; all others keep their state in 8 bits."""


class LoftqConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of LoftQ."""

    loftq_bits: Annotated[
        Annotated[int, Meta(ge=2, le=8)] | None,
        entry("Turns LoftQ on; the base keeps the bits in which it is served."),
    ] = None
    loftq_iter: Annotated[int, Meta(ge=1), entry("Only 1 is possible: the base is shared, and not rounded again.")] = 1


class PeftOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of PEFT's that Axolotl has in a mapping of their own."""

    loftq_config: Annotated[LoftqConfig | None, entry("LoftQ's options.")] = None
