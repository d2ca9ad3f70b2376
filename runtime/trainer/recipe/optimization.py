"""Keys of optimisers and of the learning rate: what goes with which of them."""

from collections.abc import Iterator
from typing import Any

from runtime.trainer.recipe.schema import Recipe

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


UNBUILT = {
    "schedule_free_adamw": "its weights to train and to publish differ",
    "schedule_free_sgd": "its weights to train and to publish differ",
    "schedule_free_radam": "its weights to train and to publish differ",
    "adopt_adamw": "use adamw_torch_fused",
    "came_pytorch": "use adafactor, which keeps as little state",
}
"""Optimisers of Axolotl that are known and not built, each with what to do."""


def take_unbuilt_optimizer(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The problem of an optimiser that is known and not built; it is taken out of `values`."""
    name = values.get("optimizer")
    if isinstance(name, str) and name in UNBUILT:
        del values["optimizer"]
        yield "optimizer", f"{name} is not built yet ({UNBUILT[name]}); adamw_torch_fused, lion, adafactor and muon are"


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
