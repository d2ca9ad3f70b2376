"""What the keys of a recipe must not say together, and what they come to.

Types and limits of single keys were checked before; nothing here knows the model or the data.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import regex

from runtime.errors import InvalidRequest
from runtime.trainer.adapters.names import name_problem
from runtime.trainer.recipe.schema import Recipe

Found = tuple[str, str]
"""A key and what is wrong with it."""

_ONE_OF = [
    ("warmup_steps", "warmup_ratio"),
    ("save_steps", "saves_per_epoch"),
    ("eval_steps", "evals_per_epoch"),
    ("val_set_size", "test_datasets"),
]
_AMOUNTS = ("eval_steps", "save_steps", "warmup_steps", "val_set_size")


def find_problems(recipe: Recipe, values: Mapping[str, Any], *, max_lora_rank: int) -> Iterator[Found]:
    """Every conflict. `values` are the keys as they were given."""
    given = {key for key, value in values.items() if value not in (None, False, 0, [], "no")}
    for one, other in _ONE_OF:
        if one in given and other in given:
            yield other, f"give {one} or {other}, not both"
    yield from _sizes(recipe, values)
    if recipe.lora_r > max_lora_rank:
        yield "lora_r", f"must be at most {max_lora_rank} (adapters.max_lora_rank), got {recipe.lora_r}"
    if recipe.lora_target_linear is False and recipe.lora_target_modules is None:
        yield "lora_target_linear", "is false, and lora_target_modules names nothing: there is nothing to train"
    if recipe.sample_packing and recipe.group_by_length:
        yield "group_by_length", "has no meaning with sample_packing, which fills its bins by length; set one of them"
    if recipe.chat_template == "jinja" and recipe.chat_template_jinja is None:
        yield "chat_template_jinja", "is missing: chat_template is jinja"
    if problem := recipe.publish.problem():
        yield "publish.when", problem
    if recipe.name is not None and (problem := name_problem(recipe.name)):
        yield "name", problem
    if isinstance(recipe.lora_target_modules, str):
        yield from _pattern(recipe.lora_target_modules)
    yield from _evaluation(recipe, given)
    yield from _datasets(recipe)


def resolve_batch(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """With micro-batch size and accumulation worked out from `batch_size`. Raises `InvalidRequest`."""
    whole = recipe.batch_size
    if whole is None:
        return recipe
    micro, steps = values.get("micro_batch_size"), values.get("gradient_accumulation_steps")
    if micro is None and steps is not None and whole % recipe.gradient_accumulation_steps == 0:
        return msgspec.structs.replace(recipe, micro_batch_size=whole // recipe.gradient_accumulation_steps)
    if steps is None and whole % recipe.micro_batch_size == 0:
        return msgspec.structs.replace(recipe, gradient_accumulation_steps=whole // recipe.micro_batch_size)
    if whole == recipe.effective_batch:
        return recipe
    given = f"{recipe.micro_batch_size} × {recipe.gradient_accumulation_steps} = {recipe.effective_batch}"
    raise InvalidRequest(
        f"is {whole}, and micro_batch_size × gradient_accumulation_steps is {given}: give whole numbers that agree, or "
        "leave one of the three out",
        param="batch_size",
    )


def _sizes(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[Found]:
    for name in _AMOUNTS:
        amount = getattr(recipe, name)
        if amount is not None and amount >= 1 and not float(amount).is_integer():
            yield name, f"expected a whole number, or a share below 1, got {amount}"
    for name in ("eval_steps", "save_steps"):
        if getattr(recipe, name) == 0 and values.get(name) is not None:
            yield name, "must be above 0; leave it out to use the default"
    if recipe.min_sample_len > recipe.sequence_len:
        yield "min_sample_len", f"must be at most sequence_len ({recipe.sequence_len}), got {recipe.min_sample_len}"
    if recipe.cosine_min_lr_ratio is None and recipe.lr_scheduler == "cosine_min_lr_ratio":
        yield "cosine_min_lr_ratio", "is missing: lr_scheduler is cosine_min_lr_ratio"
    if recipe.cosine_min_lr_ratio is not None and not recipe.lr_scheduler.startswith("cosine"):
        yield "cosine_min_lr_ratio", f"is for lr_scheduler cosine, got {recipe.lr_scheduler}"


def _evaluation(recipe: Recipe, given: set[str]) -> Iterator[Found]:
    if not recipe.evaluates:
        # Recipes come with `evals_per_epoch` whether or not they hold anything out, as Axolotl allows: noted.
        if recipe.early_stopping_patience is not None:
            yield "early_stopping_patience", "needs test data: set val_set_size or test_datasets"
        if recipe.save_strategy == "best":
            yield "save_strategy", "best needs test data: set val_set_size or test_datasets"
        if (metric := recipe.publish.metric) is not None and metric.startswith("eval_"):
            yield "publish.when", f"{metric} needs test data: set val_set_size or test_datasets"
    elif not recipe.load_best_model_at_end:
        yield (
            "load_best_model_at_end",
            "false is not supported: where there is test data, the best weights are published",
        )
    if recipe.eval_strategy == "no":
        for name in ("eval_steps", "evals_per_epoch", "early_stopping_patience"):
            if name in given:
                yield name, "has no meaning with `eval_strategy: no`"
    for kind, names in (("eval", ("eval_steps", "evals_per_epoch")), ("save", ("save_steps", "saves_per_epoch"))):
        strategy = getattr(recipe, f"{kind}_strategy")
        if strategy == "steps" and not given.intersection(names):
            yield f"{kind}_strategy", f"steps needs {kind}_steps"
        if strategy == "epoch" and names[0] in given:
            yield names[0], f"has no meaning with `{kind}_strategy: epoch`"


def _datasets(recipe: Recipe) -> Iterator[Found]:
    for group in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(recipe, group)):
            path = f"{group}[{index}]"
            if entry.train_on_eos and entry.train_on_eot and entry.train_on_eos != entry.train_on_eot:
                yield f"{path}.train_on_eot", "ends of turns are of one kind here: must be equal to train_on_eos"


def _pattern(pattern: str) -> Iterator[Found]:
    try:
        regex.compile(pattern)
    except regex.error as error:
        yield "lora_target_modules", f"is no regular expression: {error}"
