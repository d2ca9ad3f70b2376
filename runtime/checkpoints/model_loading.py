"""Loading of a checkpoint into a model: choice of the decoder, of the form of its weights, and of the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch
from torch import Tensor

import kernels
from runtime.checkpoints import Checkpoint
from runtime.checkpoints.safetensors_files import WeightFiles
from runtime.checkpoints.weight_cache import WeightCache
from runtime.model.config import ModelLoadError, architectures
from runtime.model.decoder import Decoder
from runtime.model.families import find_model, is_native
from runtime.model.families.family import Family
from runtime.model.families.registry import checked_spec
from runtime.model.group import SOLO, Group
from runtime.model.layers import WeightError
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model, make_device
from runtime.model.spec import DecoderSpec
from runtime.support.logs import get_logger
from runtime.text.tokenizer import Tokenizer
from settings.schema import ModelSettings

# -- tying -----------------------------------------------------------------------------------------
#
# Embedding and head: one weight or two, according to the checkpoint's tensors, not to its configuration alone.
#
# `tie_word_embeddings` means that the head is the embedding. A checkpoint that nevertheless holds a head with other
# values was trained with two weights: transformers 5 takes both then, and so do we. In a checkpoint that holds the head
# alone, the head is both.

ROWS_AT_ONCE = 4096
EMBEDDING, HEAD = "embedding.weight", "head.weight"


def untied(files: WeightFiles | None, family: type[Family], spec: DecoderSpec) -> DecoderSpec:
    """The spec, not `tied` where the files hold a head that differs from their embedding."""
    if files is None or not spec.tied:
        return spec
    found = _names(files, family)
    if HEAD not in found:
        quantised = found.keys() == {EMBEDDING} and _has_quantised_head(files, family)
        return replace(spec, tied=False) if quantised else spec
    if EMBEDDING not in found or _equal(files, found[EMBEDDING], found[HEAD]):
        return spec
    return replace(spec, tied=False)


def head_as_embedding(files: WeightFiles | None, family: type[Family], spec: DecoderSpec) -> dict[str, str]:
    """Name of the head → name of the embedding, where the files of a tied model hold the head alone."""
    if files is None or not spec.tied:
        return {}
    found = _names(files, family)
    if found.keys() != {HEAD}:
        return {}
    return {found[HEAD]: family.tensor_name(EMBEDDING, "")}


def _names(files: WeightFiles, family: type[Family]) -> dict[str, str]:
    """EMBEDDING and HEAD → the name of the tensor, for the tensors that are there."""
    places = {name: family.place(name) for names in files.names.values() for name in names}
    return {place[0]: name for name, place in places.items() if place in ((EMBEDDING, ""), (HEAD, ""))}


def _has_quantised_head(files: WeightFiles, family: type[Family]) -> bool:
    heads = tuple(name.removesuffix("weight") for name, place in family.OUTSIDE.items() if place == HEAD)
    return any(name.startswith(heads) for names in files.names.values() for name in names) if heads else False


def _equal(files: WeightFiles, one: str, other: str) -> bool:
    opened = files.open()
    a, b = opened.read(one), opened.read(other)
    same = a.shape == b.shape and all(
        torch.equal(_floats(a[start : start + ROWS_AT_ONCE]), _floats(b[start : start + ROWS_AT_ONCE]))
        for start in range(0, len(a), ROWS_AT_ONCE)
    )
    opened.drop()
    return same


def _floats(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 else tensor.float()


_log = get_logger(__name__)

FLOAT32_BYTES = 4


def load_model(checkpoint: Checkpoint, settings: ModelSettings, *, device: torch.device | None = None) -> Model:
    """The checkpoint's weights in our decoder, or in transformers' modules where there is no family for them; on
    `device` (default: the setting's) and in the setting's type. Raises `ModelLoadError`."""
    device = device or make_device(settings.device)
    with _load_errors(checkpoint):
        native = is_native(checkpoint.config)
    return load_decoder(checkpoint, settings, device=device) if native else _load_fallback(checkpoint, settings, device)


def base_of(model: Model, checkpoint: Checkpoint, name: str) -> LoraBase:
    """The base of adapters for `model`, which was made from `checkpoint`."""
    if isinstance(model, Decoder):
        return LoraBase.of(model, find_model(checkpoint.config), name)
    from runtime.model.fallback import FallbackDecoder, lora_base

    assert isinstance(model, FallbackDecoder)
    return lora_base(model, name)


def tokenizer_of(checkpoint: Checkpoint, model: Model) -> Tokenizer:
    """The checkpoint's tokenizer, with an id for every row of the model's embedding. Logs problems with the ends of its
    chats. Raises `ModelLoadError` naming both counts where an id has no row."""
    with _load_errors(checkpoint):
        tokenizer = checkpoint.tokenizer.sized(model.spec.vocab_size)
    for problem in tokenizer.turn_end.problems:
        _log.warning("turn_end", model=checkpoint.name, problem=problem)
    return tokenizer


def _load_fallback(checkpoint: Checkpoint, settings: ModelSettings, device: torch.device) -> Model:
    from runtime.model.fallback import load_fallback  # imports transformers

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
    architecture = ", ".join(architectures(checkpoint.config))
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
    """The checkpoint's weights in our decoder, or one rank's share of them, on `device` (default: the setting's) and in
    the setting's type. Raises `ModelLoadError`."""
    device = device or make_device(settings.device)
    with _load_errors(checkpoint):
        decoder, quantization = _make_decoder(checkpoint, settings, group, device)
        cache = WeightCache.of(checkpoint, decoder, quantization) if settings.cache_quantised else None
        if cache is not None and cache.restore(decoder):
            return decoder
        stored = _blocks(checkpoint, device) if quantization == "gguf" else checkpoint.tensors()
        family = find_model(checkpoint.config)
        renamed = head_as_embedding(checkpoint.files, family, decoder.spec)
        weights = family.weights(((renamed.get(name, name), weight) for name, weight in stored), decoder.spec)
        keep = None if cache is None else cache.keep
        decoder.load(weights, quantization=quantization, name_of=family.tensor_name, keep=keep)
        if cache is not None:
            cache.commit(decoder)
    return decoder


_VALUE_BYTES = {"int8": 1.125, "int4": 0.75, "nf4": 0.75, "gguf": 1.125}
"""Bytes of a weight by the form that it is held in, scales included: most of them."""


def value_bytes(settings: ModelSettings, device: torch.device) -> float:
    """Bytes that a value of the weights takes in memory, about."""
    return _VALUE_BYTES.get(settings.quantization, float(_dtype(settings.dtype, device).itemsize))


def spec_of(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder's spec, from the configuration of a model with a family of ours. Raises `ModelLoadError` naming the
    problem."""
    origin = "config.json" if checkpoint.source.is_dir() else "the configuration in the file's metadata"
    with _load_errors(checkpoint):
        try:
            return checked_spec(find_model(checkpoint.config), checkpoint.config)
        except KeyError as error:
            raise ValueError(f"{origin} has no {error.args[0]!r}") from error
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error


def describe_decoder(checkpoint: Checkpoint, settings: ModelSettings, group: Group) -> Decoder:
    """The decoder of one rank without its weights: for its shapes, without memory. Raises `ModelLoadError`, also for a
    model that cannot be split over the ranks of `group`."""
    with _load_errors(checkpoint):
        architecture = ", ".join(architectures(checkpoint.config))
        if not is_native(checkpoint.config):
            raise ValueError(f"{architecture} is served through transformers, which works with one rank")
        try:
            return _make_decoder(checkpoint, settings, group, make_device(settings.device), shapes_only=True)[0]
        except ValueError as error:
            raise ValueError(f"{architecture}: {error}") from error


def _make_decoder(
    checkpoint: Checkpoint, settings: ModelSettings, group: Group, device: torch.device, *, shapes_only: bool = False
) -> tuple[Decoder, str]:
    """A decoder without weights, and the form of its weights to come. `device`: the one that computes, here or, with
    `shapes_only`, elsewhere."""
    family = find_model(checkpoint.config)
    spec = spec_of(checkpoint)
    if spec.tied and not (spec := untied(checkpoint.files, family, spec)).tied:
        _log.warning(
            "head_not_tied",
            model=checkpoint.name,
            reason="tie_word_embeddings is true, and the checkpoint has a head with other values, which is used",
        )
    checkpoint.tokenizer.sized(spec.vocab_size)  # before the weights are read, which takes long
    context = _check_context(settings, spec, checkpoint)
    quantization: str = settings.quantization
    dtype = _dtype(settings.dtype, device)
    if quantization != "none" and spec.experts is not None:
        raise ValueError(f"quantization {quantization!r} is not supported for mixtures of experts; supported is: none")
    if dtype is torch.bfloat16 and device.type == "cpu" and spec.experts is None:
        # Processors without bfloat16 arithmetic would be slower with it: there only weights are stored in it.
        dtype, quantization = torch.float32, "bfloat16" if quantization == "none" else quantization
    _check_tables(spec, context, dtype)
    held = torch.device("meta") if shapes_only else device
    ops = kernels.load(settings.kernels, held)
    return Decoder(spec, ops, max_len=context, dtype=dtype, device=held, group=group), quantization


@contextmanager
def _load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (WeightError, ValueError) as error:
        raise ModelLoadError(f"{checkpoint.name}: {error}") from error


def _check_tables(spec: DecoderSpec, context: int, dtype: torch.dtype) -> None:
    """Raise `ValueError` where the angles of all positions do not fit into memory."""
    width = spec.head_dim // 2 * len(spec.ropes) + (spec.hidden_size if spec.learned_positions else 0)
    size, free = context * width * (2 * dtype.itemsize + FLOAT32_BYTES), psutil.virtual_memory().available
    if size > free:
        raise ValueError(
            f"config.json: max_position_embeddings (n_positions) is {spec.max_position}, and tables for {context} "
            f"positions take {size} bytes, of which {free} are free: set model.max_model_len"
        )


def _check_context(settings: ModelSettings, spec: DecoderSpec, checkpoint: Checkpoint) -> int:
    """The longest sequence to serve, in tokens. Raises `ModelLoadError`."""
    if spec.max_position < 2:
        raise ModelLoadError(
            f"{checkpoint.name}: config.json: max_position_embeddings must be above 1, got {spec.max_position}."
        )
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


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
