"""What a recipe says that does nothing here, or something else than it seems to: a line each, for the plan."""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.trainer.recipe.noted import NOTED
from runtime.trainer.recipe.refused import OFF
from runtime.trainer.recipe.schema import Recipe


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
