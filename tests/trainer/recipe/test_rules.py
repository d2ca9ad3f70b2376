"""Keys of preference training: the loss that they come to, and what they must not say together."""

from typing import Any

import pytest

from runtime.trainer.losses import Cpo, Dpo, Kto, Loss, Orpo, Simpo, Supervised, make_loss
from runtime.trainer.recipe import Document, Recipe, RecipeError, recipe_from
from runtime.trainer.schedule import watchdog_threshold
from runtime.trainer.sliced_run import LossSpec


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}]}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


def problems(**keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        recipe(**keys)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({}, Supervised()),
        ({"rl": "dpo"}, Dpo()),
        ({"rl": "dpo", "rl_beta": 0.3, "dpo_label_smoothing": 0.1}, Dpo(beta=0.3, label_smoothing=0.1)),
        ({"rl": "dpo", "dpo_beta": 0.3, "rpo_alpha": 0.5}, Dpo(beta=0.3, sft=0.5)),
        ({"rl": "dpo", "dpo_loss_type": "hinge"}, Dpo(sigmoid=0, hinge=1)),
        (
            {"rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [0.8, 0.2]},
            Dpo(sigmoid=0.8, sft=0.2),
        ),
        ({"rl": "dpo", "dpo_norm_loss": True}, Dpo(sigmoid=0, sigmoid_norm=1)),
        ({"rl": "ipo", "rl_beta": 0.2}, Dpo(beta=0.2, sigmoid=0, ipo=1)),
        ({"rl": "orpo", "orpo_alpha": 0.2}, Orpo(beta=0.2)),
        ({"rl": "kto", "rl_beta": 0.5, "kto_desirable_weight": 0.2}, Kto(beta=0.5, desirable_weight=0.2)),
        ({"rl": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}, Simpo(gamma=1.0, sft=0.0)),
        ({"rl": "cpo"}, Cpo()),
    ],
)
def test_the_loss_of_a_recipe(keys: dict[str, Any], loss: Loss) -> None:
    spec = LossSpec.of(made := recipe(**keys))
    assert make_loss(spec.name, spec.options) == loss
    assert made.group_size == loss.group_size


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"rl": "gdpo"}, "rl", "gdpo is not supported: the model would write"),
        ({"rl": "ppo"}, "rl", "expected one of dpo, ipo, orpo, kto, simpo, cpo, got 'ppo'"),
        ({"rl_beta": 0.1}, "rl_beta", "is for rl dpo and ipo and orpo and kto and simpo and cpo, and there is no rl"),
        ({"rl": "kto", "simpo_gamma": 0.1}, "simpo_gamma", "is for rl simpo, and rl is kto"),
        ({"rl": "dpo", "rl_beta": 0.1, "dpo_beta": 0.1}, "dpo_beta", "is another name of rl_beta"),
        ({"rl": "dpo", "dpo_loss_type": "bco_pair"}, "dpo_loss_type", "expected"),
        ({"rl": "dpo", "dpo_loss_weights": [1.0, 2.0]}, "dpo_loss_weights", "has 2 weights for 1 losses"),
        ({"rl": "dpo", "dpo_loss_type": ["ipo", "ipo"]}, "dpo_loss_type", "names a loss twice"),
        ({"rl": "dpo", "dpo_label_smoothing": 0.5}, "dpo_label_smoothing", "below 0.5"),
        (
            {"rl": "dpo", "dpo_loss_type": "hinge", "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing",
            "is for the losses sigmoid and robust",
        ),
        ({"rl": "dpo", "dpo_use_weighting": True}, "dpo_use_weighting", "WPO"),
        ({"rl": "dpo", "trl": {"beta": 0.1}}, "trl", "reinforcement training"),
        ({"datasets": [{"path": "a", "type": "chatml.intel"}]}, "datasets[0].type", "set rl to the method"),
        (
            {"rl": "dpo", "datasets": [{"path": "a", "type": "alpaca"}]},
            "datasets[0].type",
            "alpaca has one answer a row, and rl dpo trains on preferences",
        ),
        (
            {"rl": "kto", "datasets": [{"path": "a", "type": "zephyr.nectar"}]},
            "datasets[0].type",
            "kto trains on single answers",
        ),
        (
            {"rl": "dpo", "datasets": [{"path": "a", "field_label": "l"}]},
            "datasets[0].field_label",
            "has no meaning with rl dpo",
        ),
        (
            {"rl": "dpo", "datasets": [{"path": "a", "type": "chatml.intel", "prompt_format": "{prompt}"}]},
            "datasets[0].prompt_format",
            "is for type user_defined.default",
        ),
        ({"publish": {"when": "rewards/margins > 1"}, "val_set_size": 1}, "publish.when", "there is no rl"),
        ({"rl": "dpo", "publish": {"when": "rewards/margins > 1"}}, "publish.when", "needs test data"),
    ],
)
def test_one_problem(keys: dict[str, Any], key: str, message: str) -> None:
    found = problems(**keys)
    assert list(found) == [key]
    assert message in found[key]


def test_a_gate_on_rewards() -> None:
    publish = recipe(rl="dpo", val_set_size=2, publish={"when": "rewards/margins >= 0.5"}).publish
    assert [str(metric) for metric in publish.metrics] == ["eval_rewards/margins"]
    assert publish.decide({"eval_rewards/margins": 0.5, "train_rewards/margins": 0.0})[0]
    assert not publish.decide({"eval_rewards/margins": 0.4, "train_rewards/margins": 9.0})[0]
    assert publish.decide({}) == (
        False,
        "publish.when is 'rewards/margins >= 0.5', and eval_rewards/margins is not known",
    )
    trained = recipe(rl="dpo", publish={"when": "train_rewards/accuracies > 0.9"}).publish
    assert trained.decide({"train_rewards/accuracies": 1.0})[0]


def test_off_is_off() -> None:
    assert recipe(rl=None, rl_beta=None, trl=None).rl is None
    assert recipe(rl=False).rl is None


def test_the_loss_of_ipo_begins_far_above_that_of_guessing() -> None:
    """(1 / 2 beta)² is 25 for a beta of 0.1, and ln of the vocabulary 6."""
    assert watchdog_threshold(recipe(rl="dpo"), 512) == pytest.approx(7.238, abs=1e-3)
    assert watchdog_threshold(recipe(rl="ipo"), 512) == pytest.approx(100)
    assert watchdog_threshold(recipe(rl="ipo", loss_watchdog_threshold=3.0), 512) == 3
