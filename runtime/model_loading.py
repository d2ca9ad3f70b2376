"""From a checkpoint to a model: which one, in which form its weights are held, and on which device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from msgspec import ValidationError, convert

import kernels
from runtime.logs import get_logger
from runtime.workers.decoder import Decoder
from runtime.workers.device import make_device
from runtime.workers.group import SOLO, Group
from runtime.workers.layers import WeightError
from runtime.workers.loading import Checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.lora_base import LoraBase
from runtime.workers.model import Model
from runtime.workers.models import find_model, is_native
from runtime.workers.spec import DecoderSpec
from settings.schema import ModelSettings

_log = get_logger(__name__)


def load_model(checkpoint: Checkpoint, settings: ModelSettings, *, device: torch.device | None = None) -> Model:
    """The checkpoint's weights in our decoder, or in transformers' modules where there is no family for them; on the
    device (else the one that the settings ask for) and in the type that the settings ask for. Raises
    `ModelLoadError`."""
    device = device or make_device(settings.device)
    if is_native(checkpoint.config):
        return load_decoder(checkpoint, settings, device=device)
    return _load_fallback(checkpoint, settings, device)


def base_of(model: Model, checkpoint: Checkpoint, name: str) -> LoraBase:
    """What adapters for `model`, made from `checkpoint`, must fit."""
    if isinstance(model, Decoder):
        return LoraBase.of(model, find_model(checkpoint.config), name)
    from runtime.workers.fallback import FallbackDecoder, lora_base

    assert isinstance(model, FallbackDecoder)
    return lora_base(model, name)


def _load_fallback(checkpoint: Checkpoint, settings: ModelSettings, device: torch.device) -> Model:
    from runtime.workers.fallback import load_fallback  # imports transformers

    try:
        model = load_fallback(
            checkpoint.source,
            checkpoint.config,
            kernels.load(settings.kernels, device),
            max_len=settings.max_model_len,
            dtype=_dtype(settings.dtype, device),
            device=device,
            quantization=settings.quantization,
        )
    except (WeightError, ValueError) as error:
        raise ModelLoadError(f"{checkpoint.name}: {error}") from error
    _check_context(settings, model.spec, checkpoint)
    architecture = ", ".join(checkpoint.config.get("architectures", []))
    _log.warning(
        "no_native_model",
        architecture=architecture,
        served_through="transformers",
        lora_targets=len(model.targets),
    )
    return model


def load_decoder(
    checkpoint: Checkpoint, settings: ModelSettings, group: Group = SOLO, *, device: torch.device | None = None
) -> Decoder:
    """The checkpoint's weights in our decoder, or one rank's share of them, on the device (else the one that the
    settings ask for) and in the type that the settings ask for. Raises `ModelLoadError`."""
    device = device or make_device(settings.device)
    with _load_errors(checkpoint):
        decoder, quantization = _make_decoder(checkpoint, settings, group, device)
        stored = _blocks(checkpoint, device) if quantization == "gguf" else checkpoint.tensors()
        decoder.load(find_model(checkpoint.config).weights(stored, decoder.spec), quantization=quantization)
    return decoder


def describe_decoder(checkpoint: Checkpoint, settings: ModelSettings, group: Group) -> Decoder:
    """The decoder of one of the ranks without its weights, which takes no memory: for its shapes. Raises
    `ModelLoadError`, also for what so many ranks cannot share."""
    architecture = ", ".join(checkpoint.config.get("architectures", []))
    with _load_errors(checkpoint):
        if not is_native(checkpoint.config):
            raise ValueError(f"{architecture} is served through transformers, which works with one rank")
        try:
            return _make_decoder(checkpoint, settings, group, make_device(settings.device), shapes_only=True)[0]
        except ValueError as error:
            raise ValueError(f"{architecture}: {error}") from error


def _make_decoder(
    checkpoint: Checkpoint, settings: ModelSettings, group: Group, device: torch.device, *, shapes_only: bool = False
) -> tuple[Decoder, str]:
    """A decoder without weights, and in which form it is to hold them. `device`: that which computes, here or, with
    `shapes_only`, elsewhere."""
    spec = _checked(find_model(checkpoint.config).spec(checkpoint.config))
    context = _check_context(settings, spec, checkpoint)
    quantization: str = settings.quantization
    dtype = _dtype(settings.dtype, device)
    if quantization != "none" and spec.experts is not None:
        raise ValueError(f"quantization {quantization!r} is not supported for mixtures of experts; supported is: none")
    if dtype is torch.bfloat16 and device.type == "cpu" and spec.experts is None:
        # Processors without bfloat16 arithmetic would be slower with it: there it is how weights are stored.
        dtype, quantization = torch.float32, "bfloat16" if quantization == "none" else quantization
    held = torch.device("meta") if shapes_only else device
    ops = kernels.load(settings.kernels, held)
    return Decoder(spec, ops, max_len=context, dtype=dtype, device=held, group=group), quantization


@contextmanager
def _load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (WeightError, ValueError) as error:
        raise ModelLoadError(f"{checkpoint.name}: {error}") from error
    except KeyError as error:
        raise ModelLoadError(f"{checkpoint.name}: config.json has no {error.args[0]!r}") from error


def _check_context(settings: ModelSettings, spec: DecoderSpec, checkpoint: Checkpoint) -> int:
    """The longest sequence to serve. Raises `ModelLoadError`."""
    context = settings.max_model_len or spec.max_position
    if context > spec.max_context:
        raise ModelLoadError(
            f"max_model_len is {context}, but {checkpoint.name} was made for at most {spec.max_context} tokens."
        )
    return context


def _blocks(checkpoint: Checkpoint, device: torch.device) -> Iterator[tuple[str, kernels.Weight]]:
    if device.type != "cpu":
        raise ModelLoadError(f"quantization gguf works on the CPU, and model.device is {device.type!r}.")
    return checkpoint.blocks()


def _checked(spec: DecoderSpec) -> DecoderSpec:
    """Raise `ValueError` when a value from config.json is not of the type that the spec says."""
    try:
        return convert(spec, DecoderSpec, from_attributes=True)
    except ValidationError as error:
        raise ValueError(f"config.json: {error}") from None


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
