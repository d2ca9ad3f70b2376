"""Reader of an adapter's weights from its files, checked against the base model."""

import os
import re
import stat
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from runtime.checkpoints.peft.config import AdapterConfig, AdapterInvalid, parse_config
from runtime.checkpoints.peft.vocabulary import VocabularyFile, take_rows
from runtime.model.lora import Adapter, LoraLayers, LoraPart, LoraShape
from runtime.model.lora_base import LoraBase, Target
from runtime.model.token_rows import VocabularyRows
from runtime.support.durable import TOO_MANY_FILES, fresh_directory, write_file
from runtime.support.module_patterns import PatternInvalid, ends
from runtime.support.peft_files import CONFIG, WEIGHTS

# -- files -----------------------------------------------------------------------------------------
#
# Reading an adapter's files from an untrusted folder: plain files of a bounded size, no links.

MAX_CONFIG = 1 << 20
"""Largest size of an adapter_config.json, in bytes."""


def read_config(directory: Path) -> bytes:
    """The bytes of the configuration. Raises `AdapterInvalid`, and `OSError` when out of descriptors."""
    return _read(directory, CONFIG, MAX_CONFIG)


def read_weights(directory: Path, limit: int) -> bytes:
    """The bytes of the weights, at most `limit`. Raises as `read_config`.

    Read, not mapped: a mapped file that shrinks kills the process.
    """
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise AdapterInvalid(
            f"The adapter's weights are a pickle (adapter_model.bin), which can run any code when it is loaded. "
            f"Save it again with PEFT's save_pretrained(safe_serialization=True), which writes {WEIGHTS}."
        )
    return _read(directory, WEIGHTS, limit)


def _read(directory: Path, name: str, limit: int) -> bytes:
    try:
        # These flags neither follow a link nor wait for the other end of a pipe.
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterInvalid(f"The adapter has no {name}.") from None
    except OSError as error:
        if error.errno in TOO_MANY_FILES:  # not the adapter's fault
            raise
        if (directory / name).is_symlink():
            raise AdapterInvalid(f"The adapter's {name} is a link; it must be a plain file.") from None
        raise AdapterInvalid(f"The adapter's {name} cannot be read: {error.strerror}.") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterInvalid(f"The adapter's {name} is not a plain file.")
    with open(descriptor, "rb") as file:
        if status.st_size > limit:
            raise AdapterInvalid(f"The adapter's {name} has {status.st_size} bytes; at most {limit} can be right.")
        data = file.read(status.st_size + 1)
    if len(data) > status.st_size:
        raise AdapterInvalid(f"The adapter's {name} grew while it was read.")
    return data


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HEADER = 4 << 20
"""Generous limit for names and shapes in the file, in bytes."""
MAX_VOCABULARY_FILE = 1 << 38
"""Largest size of rows of embedding and head in a file that was checked before, in bytes."""

Module = tuple[int, str]
"""(layer index, name within the layer)."""


def read_adapter(directory: Path, base: LoraBase, *, max_rank: int) -> Adapter:
    """The adapter in `directory`, float32 on the CPU. Raises `AdapterInvalid` where it does not fit the base or
    `max_rank`."""
    files = read_files(directory, base, max_rank=max_rank)
    config = parse_config(files[CONFIG])
    shape = config.shape
    _check_rank(max([config.r, *config.rank_pattern.values()]), max_rank)
    try:
        tensors = load(files[WEIGHTS])
    except (SafetensorError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise AdapterInvalid(f"{WEIGHTS} is truncated or no safetensors file: {error}.") from None
    vocabulary = take_rows(tensors, config, base)
    pairs = _pairs(tensors, base, dora=config.use_dora)
    _check_targets(config, pairs, base)
    layers: LoraLayers = defaultdict(list)
    for (layer, name), pair in sorted(pairs.items(), key=lambda item: (item[0][0], base.targets[item[0][1]].start)):
        target = base.targets[name]
        module = f"{base.layers}.{layer}.{name}"
        try:
            rank, scale = shape.at(module)
        except PatternInvalid as error:
            raise AdapterInvalid(f"{CONFIG}: {error}") from None
        layers[layer, target.linear].append(_part(module, target, pair, rank, scale))
    return Adapter(shape, dict(layers), vocabulary)


def read_files(
    directory: Path, base: LoraBase, *, max_rank: int, max_vocabulary: int | None = None
) -> dict[str, bytes]:
    """The bytes of both files, by name. The weights are limited to the size of an adapter for `base`, whose rows of
    embedding and head take at most `max_vocabulary` bytes as they are served; None: any number. Raises
    `AdapterInvalid`."""
    limit = 4 * base.widest * (max_rank + 1) + _HEADER  # magnitudes are less than one more rank
    if base.vocabulary is not None:
        limit += MAX_VOCABULARY_FILE if max_vocabulary is None else base.vocabulary.file_bytes(max_vocabulary)
    return {CONFIG: read_config(directory), WEIGHTS: read_weights(directory, limit)}


def _check_rank(rank: int, limit: int) -> None:
    if rank > limit:
        raise AdapterInvalid(f"The adapter's rank is {rank}; the setting adapters.max_lora_rank allows {limit}.")


MAGNITUDE = "lora_magnitude_vector"


def _pairs(tensors: dict[str, Tensor], base: LoraBase, *, dora: bool) -> dict[Module, dict[str, Tensor]]:
    """Both factors of every module in the file, and its magnitude."""
    pairs: dict[Module, dict[str, Tensor]] = defaultdict(dict)
    pattern = re.compile(
        rf"(?:base_model\.model\.)?{re.escape(base.layers)}\.(\d{{1,6}})\.(.+)\."
        rf"(?:(lora_A|lora_B)\.weight|({MAGNITUDE})(?:\.weight)?)"
    )
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None or match[2] not in base.targets:
            raise AdapterInvalid(
                f"{WEIGHTS} has {name[:200]!r}, which is for no linear of this model. There are, in each layer: "
                f"{', '.join(base.targets)}."
            )
        if int(match[1]) >= base.num_layers:
            raise AdapterInvalid(f"{WEIGHTS} has {name!r}, but this model has {base.num_layers} layers.")
        if tensor.dtype not in _DTYPES:
            raise AdapterInvalid(f"{WEIGHTS}: {name} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
        factor, kind = pairs[int(match[1]), match[2]], match[3] or match[4]
        if kind in factor:
            raise AdapterInvalid(f"{WEIGHTS} has {name!r} twice.")
        if kind == MAGNITUDE and not dora:
            raise AdapterInvalid(f"{WEIGHTS} has {name!r}, but use_dora is not set in {CONFIG}.")
        factor[kind] = tensor
    if not pairs:
        raise AdapterInvalid(f"{WEIGHTS} holds no weights.")
    for (layer, name), factors in pairs.items():
        for kind in ("lora_A", "lora_B", *([MAGNITUDE] if dora else [])):
            if kind not in factors:
                raise AdapterInvalid(f"{WEIGHTS} lacks {kind} of {base.layers}.{layer}.{name}.")
    return pairs


def _check_targets(config: AdapterConfig, pairs: dict[Module, dict[str, Tensor]], base: LoraBase) -> None:
    """Check that a list of targets names real modules. A regular expression is not run: the tensors in the file decide.
    Raises `AdapterInvalid`."""
    if not isinstance(config.target_modules, list):
        return
    modules = [f"{base.layers}.{layer}.{name}" for layer in range(base.num_layers) for name in base.targets]
    known = {end for module in modules for end in ends(module)}
    for target in config.target_modules:
        if target not in known:
            raise AdapterInvalid(
                f"{CONFIG}: target_modules has {target[:200]!r}, which this model does not have or which cannot be "
                f"adapted. There are: {', '.join(name.rpartition('.')[2] for name in base.targets)}."
            )
    targets = set(config.target_modules)
    for layer, name in pairs:
        module = f"{base.layers}.{layer}.{name}"
        if targets.isdisjoint(ends(module)):
            raise AdapterInvalid(f"{WEIGHTS} has weights for {module}, which target_modules of {CONFIG} leaves out.")


def _part(module: str, target: Target, pair: dict[str, Tensor], rank: int, scale: float) -> LoraPart:
    expected = {
        "lora_A": [rank, target.in_features],
        "lora_B": [target.out_features, rank],
        MAGNITUDE: [target.out_features],
    }
    factors = {}
    for kind, shape in expected.items():
        if kind not in pair:  # an adapter without magnitudes
            continue
        name, tensor = kind if kind == MAGNITUDE else f"{kind}.weight", pair[kind]
        if list(tensor.shape) != shape:
            raise AdapterInvalid(f"{WEIGHTS}: {module}.{name}: expected shape {shape}, got {list(tensor.shape)}.")
        factors[kind] = tensor.float().contiguous()
        if not bool(factors[kind].isfinite().all()):
            raise AdapterInvalid(f"{WEIGHTS}: {module}.{name} has values that are not finite numbers.")
    return LoraPart(target.part, factors["lora_A"], factors["lora_B"], scale, factors.get(MAGNITUDE))


# -- writing ---------------------------------------------------------------------------------------
#
# Writer of an adapter's weights to a folder that PEFT itself loads.


def write_adapter(
    directory: Path,
    layers: LoraLayers,
    shape: LoraShape,
    base: LoraBase,
    *,
    vocabulary: VocabularyRows | None = None,
    dropout: float = 0.0,
    base_name: str | None = None,
) -> None:
    """Write an adapter to `directory`, which must not exist: after a crash it is there and whole, or not there.

    `dropout` is only recorded. So is `base_name`, by which PEFT finds the base model; default: its served name. Raises
    `ValueError` where the weights do not match `shape`, and `OSError`.
    """
    tensors = {}
    for (layer, linear), parts in layers.items():
        for part in parts:
            module = base.module(layer, linear, part.part)
            rank, _ = shape.at(module)
            if part.a.shape[0] != rank or part.b.shape[1] != rank:
                raise ValueError(f"{module} has rank {part.a.shape[0]}, but the shape says {rank}")
            tensors[f"base_model.model.{module}.lora_A.weight"] = part.a.detach().cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = part.b.detach().cpu().contiguous()
            if (part.magnitude is not None) != shape.dora:
                raise ValueError(
                    f"{module} has {'a' if part.magnitude is not None else 'no'} magnitude, unlike the shape"
                )
            if part.magnitude is not None:
                tensors[f"base_model.model.{module}.{MAGNITUDE}"] = part.magnitude.detach().cpu().contiguous()
    config = _config(layers, shape, base, dropout, base_name or base.name)
    if vocabulary is not None:
        rows = VocabularyFile.of(vocabulary, base)
        tensors, config = tensors | rows.tensors, config | rows.config
    with fresh_directory(directory) as partial:
        write_file(partial / CONFIG, msgspec.json.format(msgspec.json.encode(config)))
        write_file(partial / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _config(layers: LoraLayers, shape: LoraShape, base: LoraBase, dropout: float, base_name: str) -> dict[str, Any]:
    modules = _modules(layers, base)
    shape = shape.settled(modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": dropout,
        "use_rslora": shape.rslora,
        "rank_pattern": shape.rank_pattern,
        "alpha_pattern": shape.alpha_pattern,
        "target_modules": _targets(modules, base),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": shape.dora,
        "modules_to_save": None,
    }


def _modules(layers: LoraLayers, base: LoraBase) -> list[str]:
    """Full names of the adapted modules, each once."""
    places = [(*linear, part.part) for linear, parts in layers.items() for part in parts]
    return list(dict.fromkeys(base.module(*place) for place in places))


def _targets(modules: list[str], base: LoraBase) -> list[str]:
    """Short names (`q_proj`) where every layer has the same ones, else every module's full name."""
    short = {module.rpartition(".")[2] for module in modules}
    return sorted(short if len(modules) == len(short) * base.num_layers else modules)
