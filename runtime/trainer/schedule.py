"""Number of a job's steps, the steps at which something happens besides training, and the learning rate over them."""

import math

from msgspec import Struct

from runtime.trainer.recipe import Recipe

DEFAULT_WARMUP = 0.03
MOST_DEFAULT_WARMUP = 100
"""Axolotl's defaults, for recipes without warmup settings."""


class Schedule(Struct, frozen=True, kw_only=True):
    """Schedule in steps of the optimiser, counted from 1. The last step of an epoch may have fewer micro-batches."""

    microbatches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    epochs: float
    """Passes over the data: total steps through steps of an epoch."""
    warmup_steps: int
    eval_every: int | None
    """Steps between evaluations; None: at the end alone, if there is test data."""
    save_every: int | None
    """Steps between checkpoints; None: none, but when the job is paused."""


def make_schedule(recipe: Recipe, microbatches: int, *, evaluates: bool) -> Schedule:
    """The schedule of a recipe whose epochs have `microbatches` micro-batches."""
    per_epoch = math.ceil(microbatches / recipe.gradient_accumulation_steps)
    # A hair less, so that 0.1 × 30 is 3 steps and not 4.
    total = recipe.max_steps or max(1, math.ceil(per_epoch * recipe.num_epochs - 1e-9))
    eval_every = None
    if evaluates and recipe.eval_strategy != "no":
        eval_every = _every(recipe.eval_steps, recipe.evals_per_epoch, per_epoch, total)
    save_every = eval_every if recipe.save_strategy == "best" else None  # every checkpoint has the best weights, too
    if recipe.save_strategy not in ("no", "best"):
        save_every = _every(recipe.save_steps, recipe.saves_per_epoch, per_epoch, total)
    return Schedule(
        microbatches_per_epoch=microbatches,
        steps_per_epoch=per_epoch,
        total_steps=total,
        epochs=total / per_epoch,
        warmup_steps=_warmup(recipe, total),
        eval_every=eval_every,
        save_every=save_every,
    )


def rate_factor(recipe: Recipe, schedule: Schedule, step: int) -> float:
    """Factor of the learning rate at step `step` (from 1): a linear warmup, then `lr_scheduler`. The values of
    transformers' `get_scheduler`."""
    done, warmup = step - 1, schedule.warmup_steps
    if done < warmup:
        return done / max(1, warmup)
    progress = (done - warmup) / max(1, schedule.total_steps - warmup)
    if recipe.lr_scheduler in ("constant", "constant_with_warmup"):
        return 1.0
    if recipe.lr_scheduler == "linear":
        return max(0.0, 1.0 - progress)
    least = recipe.cosine_min_lr_ratio or 0.0
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _every(steps: float | None, times: int | None, per_epoch: int, total: int) -> int | None:
    if steps is not None:
        return _steps(steps, total)
    if times == 0:
        return None
    return max(1, math.ceil(per_epoch / (times or 1)))


def _steps(amount: float, total: int) -> int:
    """A number of steps, or, below 1, a share of all."""
    return int(amount) if amount >= 1 else max(1, math.ceil(amount * total))


def _warmup(recipe: Recipe, total: int) -> int:
    if recipe.lr_scheduler == "constant":
        return 0
    if recipe.warmup_steps is not None:
        share = recipe.warmup_steps < 1
        return min(total, int(recipe.warmup_steps * total) if share else int(recipe.warmup_steps))
    if recipe.warmup_ratio is not None:
        return int(recipe.warmup_ratio * total)
    return min(int(DEFAULT_WARMUP * total), MOST_DEFAULT_WARMUP)
