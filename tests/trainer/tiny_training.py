"""A decoder, examples and runs small enough to train in a test."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kernels
from runtime.trainer.events import RunEvent
from runtime.trainer.examples import Example
from runtime.trainer.lora import Targets
from runtime.trainer.run import TrainingRun
from runtime.trainer.snapshot import Restored
from runtime.trainer.spec import OptimizerSpec, RunSpec, ScheduleSpec
from runtime.workers.decoder import Decoder
from runtime.workers.loading import open_checkpoint
from runtime.workers.lora import LoraLayers, LoraShape
from runtime.workers.models import find_model

ALL_PARTS = {"qkv": ("q", "k", "v"), "out": ("",), "gate_up": ("gate", "up"), "down": ("",)}


def load_decoder(path: Path) -> Decoder:
    checkpoint = open_checkpoint(str(path))
    model = find_model(checkpoint.config)
    spec = model.spec(checkpoint.config)
    cpu = torch.device("cpu")
    decoder = Decoder(spec, kernels.load("reference"), max_len=spec.max_position, dtype=torch.float32, device=cpu)
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


def run_spec(decoder: Decoder, **changes: Any) -> RunSpec:
    spec = RunSpec(
        targets=all_targets(decoder),
        shape=LoraShape(rank=4, alpha=8),
        optimizer=OptimizerSpec(learning_rate=5e-3),
        schedule=ScheduleSpec(total_steps=6, warmup_steps=1),
        accumulation=2,
        save_every=2,
    )
    return replace(spec, **changes)


def batches_of(data: list[Example], size: int = 2) -> Callable[[int], list[list[Example]]]:
    def batches(epoch: int) -> list[list[Example]]:
        order = list(data)
        random.Random(epoch).shuffle(order)
        return [order[first : first + size] for first in range(0, len(order), size)]

    return batches


def write_nothing(path: Path, layers: LoraLayers) -> None:
    path.mkdir()
    (path / "adapter").write_text(str(sorted(layers)), encoding="utf-8")


def make_run(
    decoder: Decoder,
    spec: RunSpec,
    events: list[RunEvent],
    *,
    test: list[list[Example]] | None = None,
    restored: Restored | None = None,
    data: list[Example] | None = None,
) -> TrainingRun:
    batches = batches_of(data or examples(10))
    return TrainingRun(decoder, spec, batches, test or [], events.append, write_nothing, restored=restored)


def drive(run: TrainingRun, seconds: float = float("inf")) -> None:
    while run.ready:
        run.work(seconds)
