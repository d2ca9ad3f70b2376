"""Weights of a launched job: the model as ranks load it, snapshots of a run, and its result."""

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime.support.durable import make_directory, read_with, sync_directory, write_file, write_with
from runtime.support.peft_files import WEIGHTS
from runtime.trainer.course import ADAPTER, STATE, RunProgress
from runtime.trainer.launched.files import BEST, MODEL, JobFolder, LaunchSpec, stating_room
from runtime.trainer.recipe.launch import Precision, fsdp_options

PARAMETERS, OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


class LaunchedProgress(RunProgress, kw_only=True):
    """State of a launched run."""

    loss_scale: float = 0.0
    """Factor of the loss in float16; 0 where there is none."""


# -- loading ---------------------------------------------------------------------------------------


def compute_type(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that a run computes in."""
    if precision == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if good else torch.float32
    found: torch.dtype = getattr(torch, precision)
    return found


def load(spec: LaunchSpec, folder: JobFolder, compute: torch.dtype) -> nn.Module:
    """The model on the CPU, with the adapter to train. Weights that are trained are float32; a base below an adapter is
    held in the type that is computed in."""
    from transformers import AutoModelForCausalLM

    recipe, full = spec.recipe, spec.launch.full
    model: Any = AutoModelForCausalLM.from_pretrained(
        spec.model.directory,
        gguf_file=spec.model.gguf,
        dtype=torch.float32 if full else compute,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.config.use_cache = False
    if recipe.gradient_checkpointing or fsdp_options(recipe).activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not full:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder.initial), is_trainable=True)
    model.train()
    return model  # type: ignore[no-any-return]


# -- snapshots -------------------------------------------------------------------------------------


def write_snapshot(
    directory: Path,
    spec: LaunchSpec,
    folder: JobFolder,
    progress: LaunchedProgress,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    last: bool,
) -> None:
    """Write all that a run needs to go on, and the adapter; of the last one of all weights the model alone. The best
    parameters are those of `folder.best`, where a step before this one was the best. Raises `OSError`."""
    make_directory(directory)
    older = spec.recipe.load_best_model_at_end and progress.best_step not in (0, progress.step)
    result = read_with(folder.best, load_file) if older and (last or not spec.launch.full) else parameters
    if not last:
        write_tensors(directory / PARAMETERS, parameters)
        write_tensors(directory / OPTIMIZER, optimizer)
        if older:
            os.link(folder.best, directory / BEST)
    if not spec.launch.full:
        write_adapter_files(directory / ADAPTER, folder.initial, result)
    elif last:
        write_model(directory / MODEL, spec, result)
    write_file(directory / STATE, msgspec.json.encode(progress))
    sync_directory(directory)


def read_state(directory: Path) -> tuple[LaunchedProgress, dict[str, Tensor], dict[str, Tensor]]:
    """A snapshot read back: its progress, parameters and optimiser's state. Raises `OSError` and what damaged files
    raise."""
    progress = msgspec.json.decode((directory / STATE).read_bytes(), type=LaunchedProgress)
    return progress, read_with(directory / PARAMETERS, load_file), read_with(directory / OPTIMIZER, load_file)


def write_adapter_files(directory: Path, initial: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write parameters in PEFT's format, with configuration and card of the adapter that training began with."""
    make_directory(directory)
    for path in initial.iterdir():
        if path.name != WEIGHTS:
            write_file(directory / path.name, path.read_bytes())
    tensors = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in parameters.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, shown: Path | None = None
) -> None:
    """Write a file of tensors. Raises `OSError`, which names `shown`, by default `path`."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    with stating_room(shown or path, size):
        write_with(path, partial(save_file, dict(tensors), metadata=metadata))


def write_model(directory: Path, spec: LaunchSpec, parameters: Mapping[str, Tensor]) -> None:
    """Write a whole model as transformers does, in the type of the served one's files, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_directory(directory)
    source = spec.model
    config: Any = AutoConfig.from_pretrained(
        source.directory, gguf_file=source.gguf, local_files_only=True, trust_remote_code=False
    )
    # Every weight is trained, so none is read. A file of GGUF's blocks has no type to keep.
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)
    found = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in parameters.items():
            found[name].copy_(tensor)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with stating_room(directory / "model.safetensors", size):
        model.save_pretrained(directory)
    _write_tokenizer(directory, spec)
    if spec.chat_template is not None:
        write_file(directory / "chat_template.jinja", spec.chat_template.encode())


def _write_tokenizer(directory: Path, spec: LaunchSpec) -> None:
    if spec.model.gguf is not None:
        from transformers import AutoTokenizer

        made: Any = AutoTokenizer.from_pretrained(
            spec.model.directory, gguf_file=spec.model.gguf, trust_remote_code=False
        )
        made.save_pretrained(directory)
        return
    for path in Path(spec.model.directory).iterdir():
        weights = path.name.endswith(_WEIGHT_SUFFIXES) or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)
