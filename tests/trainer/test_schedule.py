"""Numbers of steps. Those of evaluations and checkpoints as shares are transformers' (`math.ceil`)."""

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from runtime.trainer.recipe import Document, Recipe, RecipeError, recipe_from
from runtime.trainer.schedule import Schedule, make_schedule, rate_factor


def schedule(microbatches: int, *, evaluates: bool = True, **keys: Any) -> Schedule:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}], "val_set_size": 1}
    recipe = recipe_from(Document({**basic, **keys}), max_lora_rank=64)
    return make_schedule(recipe, microbatches, evaluates=evaluates)


@pytest.mark.parametrize(
    ("microbatches", "keys", "per_epoch", "total"),
    [
        (10, {}, 10, 10),
        (10, {"gradient_accumulation_steps": 4}, 3, 3),
        (10, {"gradient_accumulation_steps": 4, "num_epochs": 3}, 3, 9),
        (10, {"gradient_accumulation_steps": 100}, 1, 1),
        (30, {"num_epochs": 0.1}, 30, 3),
        (10, {"num_epochs": 0.01}, 10, 1),
        (10, {"num_epochs": 1.25}, 10, 13),
        (10, {"max_steps": 7, "num_epochs": 3}, 10, 7),
        (10, {"max_steps": 25}, 10, 25),
    ],
)
def test_steps(microbatches: int, keys: dict[str, Any], per_epoch: int, total: int) -> None:
    made = schedule(microbatches, **keys)
    assert (made.steps_per_epoch, made.total_steps) == (per_epoch, total)
    assert made.epochs == pytest.approx(total / per_epoch)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"warmup_steps": 10}, 10),
        ({"warmup_steps": 0.1}, 10),
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 1000}, 100),
        ({}, 3),
        ({"lr_scheduler": "constant", "warmup_steps": 10}, 0),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 10}, 10),
    ],
)
def test_warmup(keys: dict[str, Any], steps: int) -> None:
    assert schedule(100, **keys).warmup_steps == steps


def test_warmup_by_default_is_at_most_100_steps() -> None:
    assert schedule(100_000).warmup_steps == 100


@pytest.mark.parametrize(
    ("keys", "evals", "saves"),
    [
        ({}, 100, 100),
        ({"evals_per_epoch": 4, "saves_per_epoch": 3}, 25, 34),
        ({"evals_per_epoch": 0, "saves_per_epoch": 0}, None, None),
        ({"evals_per_epoch": 1000}, 1, 100),
        ({"eval_steps": 7, "save_steps": 0.05}, 7, 10),
        ({"eval_strategy": "no", "save_strategy": "no"}, None, None),
        ({"eval_strategy": "steps", "eval_steps": 0.5, "save_strategy": "best"}, 100, 100),
    ],
)
def test_evaluations_and_checkpoints(keys: dict[str, Any], evals: int | None, saves: int | None) -> None:
    made = schedule(100, num_epochs=2, **keys)
    assert (made.eval_every, made.save_every) == (evals, saves)


def test_without_test_data_nothing_is_evaluated() -> None:
    assert schedule(100, evaluates=False, evals_per_epoch=4).eval_every is None


@pytest.mark.parametrize(
    ("keys", "name", "more"),
    [
        ({"lr_scheduler": "linear"}, "linear", {}),
        ({"lr_scheduler": "constant"}, "constant", {}),
        ({"lr_scheduler": "constant_with_warmup"}, "constant_with_warmup", {}),
        ({"lr_scheduler": "cosine"}, "cosine", {}),
        (
            {"lr_scheduler": "cosine_min_lr_ratio", "cosine_min_lr_ratio": 0.25},
            "cosine_with_min_lr",
            {"min_lr_rate": 0.25},
        ),
        ({"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.25}, "cosine_with_min_lr", {"min_lr_rate": 0.25}),
        *(
            ({"lr_scheduler": name, "lr_scheduler_kwargs": more}, name, more)
            for name, more in (
                ("cosine_with_min_lr", {"min_lr": 0.05}),
                ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.5}),
                ("cosine_with_restarts", {}),
                ("cosine_with_restarts", {"num_cycles": 3}),
                ("polynomial", {}),
                ("polynomial", {"power": 2.0, "lr_end": 0.01}),
                ("inverse_sqrt", {}),
                ("inverse_sqrt", {"timescale": 7}),
            )
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_is_that_of_transformers(
    keys: dict[str, Any], name: str, more: dict[str, Any], warmup: int
) -> None:
    basic = {"adapter": "lora", "learning_rate": 0.5, "datasets": [{"path": "a"}], "max_steps": 11}
    given = {} if name == "constant" else {"warmup_steps": warmup}
    recipe = recipe_from(Document({**basic, **given, **keys}), max_lora_rank=64)
    planned = make_schedule(recipe, 11, evaluates=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    expected = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=11, scheduler_specific_kwargs=more
    )
    for step in range(1, 12):
        assert 0.5 * rate_factor(recipe, planned, step) == pytest.approx(expected.get_last_lr()[0]), step
        optimizer.step()
        expected.step()


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 0.5, "datasets": [{"path": "a"}], "max_steps": 20}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


def factors(**keys: Any) -> list[float]:
    made = recipe(**keys)
    planned = make_schedule(made, 20, evaluates=False)
    return [rate_factor(made, planned, step) for step in range(1, 21)]


@pytest.mark.parametrize("more", [{}, {"pct_start": 0.5, "div_factor": 5.0, "final_div_factor": 10.0}])
def test_one_cycle_is_that_of_torch(more: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=20, **{"pct_start": 0.2, **more})
    for factor in factors(lr_scheduler="one_cycle", warmup_steps=4, lr_scheduler_kwargs=more):
        assert 0.5 * factor == pytest.approx(expected.get_last_lr()[0])
        optimizer.step()
        if expected.last_epoch < 19:
            expected.step()


def test_quadratic_warmup() -> None:
    plain, squared = (factors(warmup_steps=5, lr_quadratic_warmup=on) for on in (False, True))
    assert squared[:5] == pytest.approx([factor**2 for factor in plain[:5]])
    assert squared[5:] == plain[5:]


def test_a_constant_tail() -> None:
    """Half of 20 steps, then a fifth of the rate: the cosine of a run of 10 steps, and what it ends at."""
    found = factors(cosine_min_lr_ratio=0.2, cosine_constant_lr_ratio=0.5, warmup_steps=2)
    short = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * at / 8)) for at in range(8)]
    assert found == pytest.approx([0, 0.5, *short, *[0.2] * 10])


def test_rex_stays_above_a_line() -> None:
    """Axolotl's: z / (0.1 + 0.9 z) of the share z that is left."""
    found, line = factors(lr_scheduler="rex", warmup_steps=0), factors(lr_scheduler="linear", warmup_steps=0)
    assert found[0] == 1
    assert all(one > other for one, other in zip(found[1:], line[1:], strict=True))
    assert found[10] == pytest.approx(0.5 / 0.55)
    with_least = factors(lr_scheduler="rex", warmup_steps=0, cosine_min_lr_ratio=0.1)
    assert with_least[10] == pytest.approx(0.1 + 0.9 * 0.5 / 0.55)


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"lr_scheduler": "rex", "lr_scheduler_kwargs": {"power": 1}}, "lr_scheduler_kwargs", "it has none"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 0}}, "lr_scheduler_kwargs", "above 0"),
        ({"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": {"pct_start": 2}}, "lr_scheduler_kwargs", "from 0 to 1"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_kwargs", "must have one of min_lr and min_lr_rate"),
        ({"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}, "cosine_min_lr_ratio", "cosine or rex, got linear"),
        ({"cosine_constant_lr_ratio": 0.5}, "cosine_constant_lr_ratio", "needs cosine_min_lr_ratio"),
        ({"lr_scheduler": "constant", "lr_quadratic_warmup": True}, "lr_quadratic_warmup", "no warmup"),
    ],
)
def test_what_does_not_go_together(keys: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**keys)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert message in str(caught.value)
