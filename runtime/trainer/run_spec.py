"""A plan in the numbers that a training run is made from. The recipe's words end here."""

from collections.abc import Mapping
from typing import get_args

from runtime.trainer.lora import Targets
from runtime.trainer.plan import Plan
from runtime.trainer.recipe import Recipe
from runtime.trainer.spec import OptimizerSpec, RunSpec, ScheduleName, ScheduleSpec, WatchdogSpec
from runtime.workers.lora import LoraShape


def run_spec(plan: Plan, places: Mapping[str, tuple[str, str]]) -> RunSpec:
    """What a `TrainingRun` takes beside the decoder and the micro-batches; `places` is the `LORA_TARGETS` of the
    architecture that the plan was made for."""
    recipe, schedule = plan.recipe, plan.schedule
    return RunSpec(
        targets=_targets(plan, places),
        shape=LoraShape(rank=recipe.lora_r, alpha=recipe.lora_alpha, rslora=recipe.peft_use_rslora),
        dropout=recipe.lora_dropout,
        optimizer=OptimizerSpec(
            name=recipe.optimizer_family,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            epsilon=recipe.adam_epsilon,
            max_grad_norm=recipe.max_grad_norm or None,
        ),
        schedule=ScheduleSpec(
            name=_schedule_name(recipe),
            total_steps=schedule.total_steps,
            warmup_steps=schedule.warmup_steps,
            min_ratio=recipe.cosine_min_lr_ratio or 0.0,
        ),
        watchdog=WatchdogSpec(threshold=recipe.loss_watchdog_threshold, patience=recipe.loss_watchdog_patience),
        accumulation=recipe.gradient_accumulation_steps,
        checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        eval_every=schedule.eval_every,
        save_every=schedule.save_every,
        early_stopping=recipe.early_stopping_patience,
    )


def _targets(plan: Plan, places: Mapping[str, tuple[str, str]]) -> Targets:
    """By the decoder's linears, each with its parts in the order in which they lie there."""
    wanted = set(plan.targets)
    found: dict[tuple[int, str], list[str]] = {}
    for layer in sorted({layer for layer, _ in plan.targets}):
        for name, (linear, part) in places.items():  # in that order
            if (layer, name) in wanted:
                found.setdefault((layer, linear), []).append(part)
    return found


def _schedule_name(recipe: Recipe) -> ScheduleName:
    names: tuple[ScheduleName, ...] = get_args(ScheduleName)
    return next(name for name in names if recipe.lr_scheduler.startswith(name))
