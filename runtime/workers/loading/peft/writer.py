"""From weights to a folder that PEFT itself loads."""

from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save

from runtime.durable import fresh_directory, write_file
from runtime.workers.loading.peft.config import lookup
from runtime.workers.loading.peft.names import CONFIG, WEIGHTS
from runtime.workers.lora import LoraLayers, LoraShape
from runtime.workers.lora_base import LoraBase


def write_adapter(
    directory: Path, layers: LoraLayers, shape: LoraShape, base: LoraBase, *, dropout: float = 0.0
) -> None:
    """Write an adapter to `directory`, which must not exist: after a crash it is there and whole, or not there.

    `dropout` is only noted. Raises `ValueError` where the weights are not what `shape` says, and `OSError`.
    """
    tensors = {}
    for (layer, linear), parts in layers.items():
        for part in parts:
            module = base.module(layer, linear, part.part)
            rank = lookup(shape.rank_pattern, module, shape.rank)
            if part.a.shape[0] != rank or part.b.shape[1] != rank:
                raise ValueError(f"{module} has rank {part.a.shape[0]}, but the shape says {rank}")
            tensors[f"base_model.model.{module}.lora_A.weight"] = part.a.detach().cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = part.b.detach().cpu().contiguous()
    config = _config(layers, shape, base, dropout)
    with fresh_directory(directory) as partial:
        write_file(partial / CONFIG, msgspec.json.format(msgspec.json.encode(config)))
        write_file(partial / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _config(layers: LoraLayers, shape: LoraShape, base: LoraBase, dropout: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": dropout,
        "use_rslora": shape.rslora,
        "rank_pattern": shape.rank_pattern,
        "alpha_pattern": shape.alpha_pattern,
        "target_modules": _targets(layers, base),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": None,
    }


def _targets(layers: LoraLayers, base: LoraBase) -> list[str]:
    """Short names (`q_proj`) where every layer has the same ones, else every module's full name."""
    modules = {base.module(layer, linear, part.part) for (layer, linear), parts in layers.items() for part in parts}
    short = {module.rpartition(".")[2] for module in modules}
    return sorted(short if len(modules) == len(short) * base.num_layers else modules)
