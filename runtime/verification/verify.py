"""All checks of one checkpoint, one after the other; a model is let go before the next is loaded."""

import gc
from dataclasses import dataclass

import msgspec
import torch

from runtime.model_loading import load_model
from runtime.verification.files import check_files
from runtime.verification.logits import PROMPTS, compare, greedy, ours, transformers_logits
from runtime.verification.report import Check, Report
from runtime.verification.tensors import check_tensors
from runtime.workers.loading import Checkpoint, open_checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.memory import return_freed_memory
from runtime.workers.models import find_model, is_native
from settings.schema import ModelSettings


@dataclass(frozen=True, eq=False)
class _Computed:
    """What the model gave here."""

    prompts: list[list[int]]
    logits: list[torch.Tensor]
    integers: bool


def verify(settings: ModelSettings) -> Report:
    """Look at the model that the settings name. Raises `ModelLoadError` for one whose files cannot be opened at all."""
    return_freed_memory()
    checkpoint = open_checkpoint(settings.model, revision=settings.revision, chat_template=settings.chat_template)
    checks = check_files(checkpoint.source)
    try:
        native = is_native(checkpoint.config)
        served = "our decoder" if native else "transformers' modules"
        checks.append(Check("architecture", f"{', '.join(checkpoint.config.get('architectures') or [])}: {served}"))
        if native:
            checks += check_tensors(checkpoint, find_model(checkpoint.config))
        if all(check.ok for check in checks):
            checks += _computed(checkpoint, settings)
    except (ModelLoadError, ValueError, KeyError) as error:
        checks.append(Check("loading", str(error), ok=False))
    return Report(checkpoint.name, checks)


def _computed(checkpoint: Checkpoint, settings: ModelSettings) -> list[Check]:
    found = _here(checkpoint, settings)
    gc.collect()
    try:
        theirs = transformers_logits(checkpoint)
    except Exception as error:  # whatever transformers raises for what it cannot load
        return [Check("transformers", f"cannot load this checkpoint, so nothing was compared: {error}", ok=False)]
    return compare(found.prompts, found.logits, theirs, integers=found.integers)


def _here(checkpoint: Checkpoint, settings: ModelSettings) -> _Computed:
    model = load_model(checkpoint, msgspec.structs.replace(settings, dtype="float32"))
    logits = ours(model)
    room = model.max_len // 2
    prompts = [greedy(logits, checkpoint.tokenizer.encode(text)[:room]) for text in PROMPTS]
    integers = any(parameter.quantised is not None for parameter in model.parameters().values())
    return _Computed(prompts, [logits(ids) for ids in prompts], integers)
