"""From a plan to a run: every number arrives, and the run takes the steps that the plan says."""

from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.events import EvalEvent, FinishedEvent, RunEvent, StepEvent
from runtime.model.families.llama import Llama
from runtime.trainer.data.files import DataFiles
from runtime.trainer.plan.plan import Plan, feed, prepare
from runtime.trainer.plan.served_model import by_linear, shape_of
from runtime.trainer.recipe import Document, recipe_from
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import RunSpec
from tests.trainer.tiny_training import drive, load_decoder, write_nothing

EXAMPLES = Path(__file__).parents[3] / "settings" / "recipes"


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Any:
    return load_decoder(tiny_model)


def make_plan(tiny_model: Path, decoder: Any, **keys: Any) -> Plan:
    basic = {"adapter": "lora", "learning_rate": 5e-3, "datasets": [{"path": "data/newts.jsonl"}], "lora_r": 4}
    return prepare(
        recipe_from(Document({**basic, **keys}), max_lora_rank=64),
        load_tokenizer(tiny_model, {}, {}),
        DataFiles(roots=[EXAMPLES]),
        model_names=("tiny",),
        max_len=512,
        shape=shape_of(decoder.spec, Llama.LORA_TARGETS, bytes_per_value=4),
    )


def spec_of(plan: Plan) -> RunSpec:
    return RunSpec(recipe=plan.recipe, schedule=plan.schedule, targets=by_linear(plan.targets, Llama.LORA_TARGETS))


def test_a_run_takes_the_steps_of_its_plan(tiny_model: Path, decoder: Any) -> None:
    plan = make_plan(
        tiny_model,
        decoder,
        lora_target_modules=["v_proj", "up_proj", "q_proj"],
        sample_packing=True,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=3,
        val_set_size=2,
        evals_per_epoch=1,
    )
    spec = spec_of(plan)
    assert spec.targets == {
        (layer, name): parts for layer in (0, 1) for name, parts in (("qkv", ["q", "v"]), ("gate_up", ["up"]))
    }
    events: list[RunEvent] = []
    run = TrainingRun(decoder, spec, feed(plan).epoch, feed(plan).test, events.append, write_nothing)
    drive(run)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert isinstance(events[-1], FinishedEvent)
    assert len(steps) == plan.schedule.total_steps
    assert steps[-1].epoch == plan.schedule.epochs == 3
    assert sum(step.tokens for step in steps) == 3 * plan.train_stats.tokens
    assert sum(step.trained_tokens for step in steps) == 3 * plan.train_stats.trained_tokens
    assert sum(isinstance(event, EvalEvent) for event in events) == 3
    assert steps[-1].loss < steps[0].loss
    assert sum(tensor.numel() for tensor in run._lora.capture().values()) == plan.estimate.parameters


@pytest.mark.parametrize(
    ("keys", "path", "value"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "recipe.optimizer_family", "adamw_8bit"),
        ({"optimizer": "sgd"}, "recipe.optimizer_family", "sgd"),
        ({"max_grad_norm": 0}, "recipe.max_grad_norm", 0.0),
        ({"max_grad_norm": 0.5}, "recipe.max_grad_norm", 0.5),
        ({"adam_beta2": 0.95, "adam_beta1": 0.8}, "recipe.adam_beta1", 0.8),
        ({"adam_beta2": 0.95, "adam_beta1": 0.8}, "recipe.adam_beta2", 0.95),
        ({"adam_epsilon": 1e-6}, "recipe.adam_epsilon", 1e-6),
        ({"weight_decay": 0.1}, "recipe.weight_decay", 0.1),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 3}, "recipe.lr_scheduler", "constant_with_warmup"),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 3}, "schedule.warmup_steps", 3),
        ({"lr_scheduler": "linear"}, "recipe.lr_scheduler", "linear"),
        (
            {"lr_scheduler": "cosine_min_lr_ratio", "cosine_min_lr_ratio": 0.1},
            "recipe.lr_scheduler",
            "cosine_min_lr_ratio",
        ),
        ({"cosine_min_lr_ratio": 0.1}, "recipe.cosine_min_lr_ratio", 0.1),
        ({"lora_dropout": 0.05}, "recipe.lora_dropout", 0.05),
        ({"peft_use_rslora": True}, "shape.rslora", True),
        ({"lora_alpha": 32}, "shape.alpha", 32.0),
        ({"loss_watchdog_threshold": 5, "loss_watchdog_patience": 2}, "recipe.loss_watchdog_threshold", 5.0),
        ({"gradient_checkpointing": "offload"}, "recipe.gradient_checkpointing", True),
        ({"gradient_accumulation_steps": 3}, "recipe.gradient_accumulation_steps", 3),
        ({"seed": 7}, "recipe.seed", 7),
        ({"early_stopping_patience": 2, "val_set_size": 2}, "recipe.early_stopping_patience", 2),
        ({"save_steps": 5}, "schedule.save_every", 5),
        ({"val_set_size": 2, "eval_steps": 4}, "schedule.eval_every", 4),
    ],
)
def test_every_key_arrives(tiny_model: Path, decoder: Any, keys: dict[str, Any], path: str, value: object) -> None:
    found: Any = spec_of(make_plan(tiny_model, decoder, **keys))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
