"""Keys that go together: those of preference training with its methods, and Axolotl's other ways to write the same;
those of optimisers and of the learning rate with each of them; those of the adapter."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from runtime.support.module_patterns import ModulePattern, PatternInvalid
from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.keys import is_off
from runtime.trainer.recipe.schema import DATA_GROUPS, Recipe
from settings.suggest import hint

GENERATES = ("grpo", "gdpo", "ebft")
"""Methods of Axolotl's under which the model writes the answers that it is trained on."""

_METHODS: dict[str, tuple[str, ...]] = {
    "rl_beta": ("dpo", "ipo", "orpo", "kto", "simpo", "cpo"),
    "dpo_beta": ("dpo", "ipo"),
    "dpo_loss_type": ("dpo",),
    "dpo_loss_weights": ("dpo",),
    "dpo_label_smoothing": ("dpo",),
    "dpo_norm_loss": ("dpo",),
    "rpo_alpha": ("dpo", "ipo"),
    "orpo_alpha": ("orpo",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "cpo_alpha": ("simpo", "cpo"),
    "simpo_gamma": ("simpo",),
}
"""Key → the methods that it is for."""

_COLUMNS = ("field_prompt", "field_chosen", "field_rejected", "field_completion", "field_label")
_FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")
_OF_PAIRS = ("field_chosen", "field_rejected", "chosen_format", "rejected_format")
_OF_LABELS = ("field_completion", "field_label", "completion_format")
_BOTH = ("auto", "chat_template.default")
"""Types of rows that have one answer, or with `rl` two."""
_FAMILIES = ("chatml", "llama3", "zephyr", "user_defined", "passthrough", "openai", "chat_template.argilla")
"""Beginnings of the types of rows that have preferences."""
_PAIRS_ONLY = ("zephyr.nectar", "openai", "chat_template.argilla")

BETA = 0.1
"""Default of `rl_beta`, TRL's."""


def beta_of(recipe: Recipe) -> float:
    """Scale of rewards, by any of its names."""
    return recipe.rl_beta or recipe.dpo_beta or recipe.orpo_alpha or BETA


def flatten_types(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same recipe with each preference dataset's `type: {field_prompt: …}` as `type: user_defined.default`, and
    its keys beside; and with a single loss as a list of one."""
    found = dict(values)
    if isinstance(term := values.get("dpo_loss_type"), str) and term:
        found["dpo_loss_type"] = [term]
    if values.get("rl") is None:
        return found
    for group in DATA_GROUPS:
        entries = [values[group]] if isinstance(values.get(group), dict) else values.get(group)
        if isinstance(entries, list):
            found[group] = [_flat(entry) for entry in entries]
    return found


def _flat(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), dict):
        return entry
    rest = {key: value for key, value in entry.items() if key != "type"}
    return {**rest, **entry["type"], "type": "user_defined.default"}


def take_unbuilt(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The problem of a method that is known and not built; it is taken out of `values`."""
    if (method := values.get("rl")) in GENERATES:
        del values["rl"]
        yield (
            "rl",
            f"{method} is not supported: the model would write and have judged what it is trained on. Collect answers "
            "with judgements first, and train on them with dpo, ipo, orpo, kto or simpo",
        )
    elif method is False:
        del values["rl"]


def preference_problems(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Conflicts of keys with the method. `values` are the keys as they were given."""
    for name, methods in _METHODS.items():
        if is_off(values.get(name)) or recipe.rl in methods:
            continue
        given = "there is no rl" if recipe.rl is None else f"rl is {recipe.rl}"
        yield name, f"is for rl {' and '.join(methods)}, and {given}"
    named = [name for name in ("rl_beta", "dpo_beta", "orpo_alpha") if getattr(recipe, name) is not None]
    if len(named) > 1:
        yield named[1], f"is another name of {named[0]}: give one of them"
    yield from _dpo(recipe)
    for group in DATA_GROUPS:
        for index, entry in enumerate(getattr(recipe, group)):
            yield from _entry(recipe, entry, f"{group}[{index}]")


def _dpo(recipe: Recipe) -> Iterator[tuple[str, str]]:
    terms, weights = recipe.dpo_loss_type or ("sigmoid",), recipe.dpo_loss_weights
    if len(set(terms)) < len(terms):
        yield "dpo_loss_type", "names a loss twice"
    if weights and len(weights) != len(terms):
        yield "dpo_loss_weights", f"has {len(weights)} weights for {len(terms)} losses"
    if recipe.dpo_norm_loss and terms != ("sigmoid",):
        yield "dpo_norm_loss", "is sigmoid by means (dpo_loss_type sigmoid_norm), and dpo_loss_type names others"
    if recipe.rpo_alpha is not None and "sft" in terms:
        yield "rpo_alpha", "is the weight of sft, which dpo_loss_type has too; give one of them"
    if recipe.dpo_label_smoothing and not {"sigmoid", "robust"}.intersection(terms):
        yield "dpo_label_smoothing", f"is for the losses sigmoid and robust, and dpo_loss_type is {', '.join(terms)}"


def _entry(recipe: Recipe, entry: Dataset, path: str) -> Iterator[tuple[str, str]]:
    preferences = isinstance(entry.type, str) and entry.type.startswith(_FAMILIES)
    if recipe.rl is None:
        if preferences:
            yield f"{path}.type", f"{entry.type} is of preferences: set rl to the method to train by, such as dpo"
        for name in (*_COLUMNS, *_FORMATS):
            if getattr(entry, name) is not None:
                yield f"{path}.{name}", "is for preferences, and there is no rl"
        return
    if not preferences and entry.type not in _BOTH:
        kind = entry.type if isinstance(entry.type, str) else "it"
        yield (
            f"{path}.type",
            f"{kind} has one answer a row, and rl {recipe.rl} trains on preferences: use chat_template.default, "
            "chatml.intel or another of theirs",
        )
    if recipe.rl == "kto" and entry.type in _PAIRS_ONLY:
        yield f"{path}.type", f"{entry.type} has pairs, and kto trains on single answers with labels"
    unread = _OF_LABELS if recipe.rl != "kto" else _OF_PAIRS
    for name in unread:
        if getattr(entry, name) is not None:
            yield f"{path}.{name}", f"has no meaning with rl {recipe.rl}"
    for name in _FORMATS:
        if getattr(entry, name) is not None and entry.type != "user_defined.default":
            yield f"{path}.{name}", f"is for type user_defined.default, got {entry.type}"


# -- optimisers and the learning rate --------------------------------------------------------------


_SCHEDULER_OPTIONS: dict[str, frozenset[str]] = {
    "cosine": frozenset({"num_cycles"}),
    "cosine_min_lr_ratio": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "inverse_sqrt": frozenset({"timescale"}),
    "one_cycle": frozenset({"pct_start", "div_factor", "final_div_factor"}),
}
"""Schedule → the options of `lr_scheduler_kwargs` that it has."""

_LEAST = ("cosine", "cosine_min_lr_ratio", "rex")
"""Schedules that end at `cosine_min_lr_ratio`."""


def optimizer_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Conflicts of keys with the optimiser."""
    if recipe.optimizer_family.startswith("schedule_free") and recipe.adam_beta1 == 0:
        yield "adam_beta1", f"must be above 0 with {recipe.optimizer}, whose mean of weights needs it"


def schedule_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Conflicts of keys with the schedule of the learning rate."""
    name, options = recipe.lr_scheduler, recipe.lr_scheduler_kwargs
    known = _SCHEDULER_OPTIONS.get(name, frozenset())
    for option, value in options.items():
        if option not in known:
            yield "lr_scheduler_kwargs", f"{name} has no option {option[:64]!r}; it has {_listed(known)}"
        elif value <= 0 and option not in ("lr_end", "min_lr", "min_lr_rate", "pct_start"):
            yield "lr_scheduler_kwargs", f"{option} must be above 0, got {value:g}"
        elif value < 0 or (option in ("min_lr_rate", "pct_start") and value > 1):
            yield (
                "lr_scheduler_kwargs",
                f"{option} must be from 0 {'to 1' if option != 'min_lr' else 'on'}, got {value:g}",
            )
    if name == "cosine_with_min_lr" and len(options.keys() & {"min_lr", "min_lr_rate"}) != 1:
        yield "lr_scheduler_kwargs", "must have one of min_lr and min_lr_rate: lr_scheduler is cosine_with_min_lr"
    least = recipe.cosine_min_lr_ratio
    if least is None and name == "cosine_min_lr_ratio":
        yield "cosine_min_lr_ratio", "is missing: lr_scheduler is cosine_min_lr_ratio"
    if least is not None and name not in _LEAST:
        yield "cosine_min_lr_ratio", f"is for lr_scheduler cosine or rex, got {name}"
    if recipe.cosine_constant_lr_ratio is not None:
        if name not in ("cosine", "cosine_min_lr_ratio"):
            yield "cosine_constant_lr_ratio", f"is for lr_scheduler cosine, got {name}"
        elif least is None:
            yield "cosine_constant_lr_ratio", "needs cosine_min_lr_ratio, the share that stays"
    if recipe.lr_quadratic_warmup and name in ("constant", "one_cycle"):
        yield "lr_quadratic_warmup", f"lr_scheduler {name} has no warmup of its own"


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


# -- adapters --------------------------------------------------------------------------------------
#
# The kind of adapter that is trained, and what it begins with.

_DRAWN = ("gaussian", "orthogonal")
"""Kinds of first weights that are drawn…"""
_MADE = ("pissa", "olora", "loftq")
"""…and made from the base's weights."""
_UNBUILT = {
    "eva": "it looks at the base's activations on the data, which is not built",
    "corda": "it looks at the base's activations on the data, which is not built",
    "lora_ga": "it looks at gradients of the base on the data, which is not built",
    "mica": "it leaves B as it is in training, which is not built",
}
_NITER = re.compile(r"pissa_niter_([0-9]{1,2})")


def adapter_problems(recipe: Recipe, given: Collection[str], *, max_lora_rank: int) -> Iterator[tuple[str, str]]:
    """Keys and what is wrong with them. `given`: the keys that are set."""
    limit = max_lora_rank // 2 if recipe.begins_in_base else max_lora_rank
    for key, rank in _ranks(recipe):
        if rank > max_lora_rank:
            yield key, f"must be at most {max_lora_rank} (adapters.max_lora_rank), got {rank}"
        elif rank > limit:
            yield (
                key,
                f"must be at most {limit} with {recipe.first_weights}, got {rank}: the adapter is published with twice "
                f"the rank, and adapters.max_lora_rank is {max_lora_rank}",
            )
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        try:
            ModulePattern(key, getattr(recipe, key))
        except PatternInvalid as error:
            yield key, str(error).removeprefix(f"{key} ").rstrip(".")
    if recipe.peft_use_dora and recipe.optimizer_family == "muon":
        yield "optimizer", "muon is for matrices, and DoRA's magnitudes are none: use adamw_torch, or leave out DoRA"
    yield from _first_weights(recipe, given)


def _ranks(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Every rank that the recipe asks for, by its key."""
    yield "lora_r", recipe.lora_r
    for name, rank in recipe.lora_rank_pattern.items():
        yield f"lora_rank_pattern.{name[:64]}", rank


def _first_weights(recipe: Recipe, given: Collection[str]) -> Iterator[tuple[str, str]]:
    key, named, kind = "peft_init_lora_weights", recipe.peft_init_lora_weights, recipe.first_weights
    loftq = recipe.peft and recipe.peft.loftq_config
    if loftq and loftq.loftq_iter != 1:
        yield "peft.loftq_config.loftq_iter", f"must be 1: the served base is not rounded again, got {loftq.loftq_iter}"
    if loftq and loftq.loftq_bits and isinstance(named, str) and named != "loftq":
        yield key, f"is {named!r}, and peft.loftq_config asks for loftq; give one of them"
    if isinstance(named, str) and named not in (*_DRAWN, *_MADE) and not _NITER.fullmatch(named):
        if named in _UNBUILT:
            yield key, f"{named} is not supported: {_UNBUILT[named]}; use pissa, gaussian, or leave it out"
        else:
            known = (*_DRAWN, *_MADE)
            near = hint(named, known)
            yield key, f"is {named[:64]!r}{near}; known are true, {', '.join(known)} and pissa_niter_N"
        return
    odd = next((found for found in _ranks(recipe) if found[1] % 2), None) if kind == "orthogonal" else None
    if odd is not None:
        yield key, f"orthogonal needs an even {odd[0]}, got {odd[1]}"
    if kind not in ("uniform", *_DRAWN) and recipe.peft_use_dora:
        yield "peft_use_dora", f"is not possible with first weights from {kind}: leave one of the two out"
    if recipe.lora_model_dir is not None and kind != "uniform":
        yield (
            (key if key in given else "peft"),
            "has no meaning with lora_model_dir: the first weights are the adapter's",
        )
