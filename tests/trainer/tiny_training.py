"""A decoder, examples and runs small enough to train in a test."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernels
from runtime.checkpoints import open_checkpoint
from runtime.events import RunEvent
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.families.llama import Llama
from runtime.model.group import SOLO, Group
from runtime.model.lora import Adapter, LoraShape
from runtime.model.lora_base import LoraBase
from runtime.model.vocabulary import RowTargets
from runtime.trainer.course import Restored
from runtime.trainer.data.example import Example
from runtime.trainer.lora import PartSizes, Targets, sizes_of
from runtime.trainer.recipe import Dataset, Recipe
from runtime.trainer.run import TrainingRun
from runtime.trainer.schedule import Schedule
from runtime.trainer.sliced_run import LossSpec, RunSpec, shape_of_recipe

ALL_PARTS = {"qkv": ("q", "k", "v"), "out": ("",), "gate_up": ("gate", "up"), "down": ("",)}


def load_decoder(path: Path, group: Group = SOLO) -> Decoder:
    checkpoint = open_checkpoint(str(path))
    model = find_model(checkpoint.config)
    spec = model.spec(checkpoint.config)
    cpu = torch.device("cpu")
    ops = kernels.load("reference")
    decoder = Decoder(spec, ops, max_len=spec.max_position, dtype=torch.float32, device=cpu, group=group)
    decoder.load(model.weights(checkpoint.tensors(), spec))
    return decoder


def all_targets(decoder: Decoder) -> Targets:
    return {(layer.index, name): parts for layer in decoder.layers for name, parts in ALL_PARTS.items()}


def examples(count: int, *, seed: int = 0, longest: int = 40) -> list[Example]:
    """Random tokens of random lengths; the first part of each is a prompt that is not trained on."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        length = rng.randint(4, longest)
        prompt = rng.randint(1, length - 2)
        ids = [rng.randrange(512) for _ in range(length)]
        made.append(Example(ids, [place >= prompt for place in range(length)]))
    return made


def llama_sizes(decoder: Decoder, targets: Targets, shape: LoraShape) -> PartSizes:
    """Ranks and scales by the patterns of a shape, by the names of a Llama."""
    if not (shape.rank_pattern or shape.alpha_pattern):
        return {}
    return sizes_of(targets, shape, LoraBase.described(decoder, Llama, "tiny", ""))


def run_spec(
    decoder: Decoder,
    *,
    targets: Targets | None = None,
    total_steps: int = 6,
    warmup_steps: int = 1,
    eval_every: int | None = None,
    save_every: int | None = 2,
    loss: LossSpec | None = None,
    rows: RowTargets | None = None,
    **keys: Any,
) -> RunSpec:
    """`keys` are those of the recipe."""
    basic = {"learning_rate": 5e-3, "lora_r": 4, "lora_alpha": 8.0, "gradient_accumulation_steps": 2}
    recipe = Recipe(adapter="lora", datasets=(Dataset(path="rows.jsonl"),), **{**basic, **keys})
    schedule = Schedule(
        microbatches_per_epoch=2 * total_steps,
        steps_per_epoch=total_steps,
        total_steps=total_steps,
        epochs=1.0,
        warmup_steps=warmup_steps,
        eval_every=eval_every,
        save_every=save_every,
    )
    targets = targets or all_targets(decoder)
    return RunSpec(
        recipe=recipe,
        schedule=schedule,
        targets=targets,
        loss=loss or LossSpec(),
        rows=rows or RowTargets(),
        sizes=llama_sizes(decoder, targets, shape_of_recipe(recipe)),
    )


def batches_of(data: list[Example], size: int = 2) -> Callable[[int], list[list[Example]]]:
    def batches(epoch: int) -> list[list[Example]]:
        order = list(data)
        random.Random(epoch).shuffle(order)
        return [order[first : first + size] for first in range(0, len(order), size)]

    return batches


def write_nothing(path: Path, adapter: Adapter) -> None:
    path.mkdir()
    (path / "adapter").write_text(str(sorted(adapter.layers)), encoding="utf-8")


def make_run(
    decoder: Decoder,
    spec: RunSpec,
    events: list[RunEvent],
    *,
    test: list[list[Example]] | None = None,
    restored: Restored | None = None,
    data: list[Example] | None = None,
    clock: Callable[[], float] | None = None,
) -> TrainingRun:
    batches = batches_of(data or examples(10))
    return TrainingRun(decoder, spec, batches, test or [], events.append, write_nothing, restored=restored, clock=clock)


def drive(run: TrainingRun, seconds: float = float("inf")) -> None:
    while run.ready:
        run.work(seconds)
