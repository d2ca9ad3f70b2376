"""From an adapter's files to its weights, checked against the base model that they are for."""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from runtime.workers.loading.peft.config import AdapterConfig, lookup, parse_config
from runtime.workers.loading.peft.errors import AdapterInvalid
from runtime.workers.loading.peft.files import read_config, read_weights
from runtime.workers.loading.peft.names import CONFIG, WEIGHTS
from runtime.workers.lora import Adapter, LoraLayers, LoraPart
from runtime.workers.lora_base import LoraBase, Target

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HEADER = 4 << 20
"""Bytes that names and shapes may take in the file, generously."""

Module = tuple[int, str]
"""Layer index, and name within the layer."""


def read_adapter(directory: Path, base: LoraBase, *, max_rank: int) -> Adapter:
    """The adapter in `directory`, float32 on the CPU. Raises `AdapterInvalid` for whatever does not fit."""
    files = read_files(directory, base, max_rank=max_rank)
    config = parse_config(files[CONFIG])
    _check_rank(max([config.r, *config.rank_pattern.values()]), max_rank)
    try:
        tensors = load(files[WEIGHTS])
    except (SafetensorError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise AdapterInvalid(f"{WEIGHTS} is truncated or no safetensors file: {error}.") from None
    pairs = _pairs(tensors, base)
    _check_targets(config, pairs, base)
    layers: LoraLayers = defaultdict(list)
    for (layer, name), pair in sorted(pairs.items(), key=lambda item: (item[0][0], base.targets[item[0][1]].start)):
        target = base.targets[name]
        part = _part(f"{base.layers}.{layer}.{name}", target, pair, config)
        layers[layer, target.linear].append(part)
    return Adapter(config.shape, dict(layers))


def read_files(directory: Path, base: LoraBase, *, max_rank: int) -> dict[str, bytes]:
    """The bytes of both files, no more of them than an adapter can have. Raises `AdapterInvalid`."""
    limit = 4 * base.widest * max_rank + _HEADER
    return {CONFIG: read_config(directory), WEIGHTS: read_weights(directory, limit)}


def _check_rank(rank: int, limit: int) -> None:
    if rank > limit:
        raise AdapterInvalid(f"The adapter's rank is {rank}; the setting adapters.max_lora_rank allows {limit}.")


def _pairs(tensors: dict[str, Tensor], base: LoraBase) -> dict[Module, dict[str, Tensor]]:
    """Both factors of every module in the file."""
    pairs: dict[Module, dict[str, Tensor]] = defaultdict(dict)
    pattern = re.compile(rf"(?:base_model\.model\.)?{re.escape(base.layers)}\.(\d{{1,6}})\.(.+)\.lora_(A|B)\.weight")
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
        factor = pairs[int(match[1]), match[2]]
        if match[3] in factor:
            raise AdapterInvalid(f"{WEIGHTS} has {name!r} twice.")
        factor[match[3]] = tensor
    if not pairs:
        raise AdapterInvalid(f"{WEIGHTS} holds no weights.")
    for (layer, name), factors in pairs.items():
        if len(factors) != 2:
            lacking = "B" if "A" in factors else "A"
            raise AdapterInvalid(f"{WEIGHTS} lacks lora_{lacking} of {base.layers}.{layer}.{name}.")
    return pairs


def _check_targets(config: AdapterConfig, pairs: dict[Module, dict[str, Tensor]], base: LoraBase) -> None:
    """A list of targets must name real modules. A regular expression is not run: the file says what there is."""
    if not isinstance(config.target_modules, list):
        return
    modules = [f"{base.layers}.{layer}.{name}" for layer in range(base.num_layers) for name in base.targets]
    for target in config.target_modules:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise AdapterInvalid(
                f"{CONFIG}: target_modules has {target[:200]!r}, which this model does not have or which cannot be "
                f"adapted. There are: {', '.join(name.rpartition('.')[2] for name in base.targets)}."
            )
    for layer, name in pairs:
        module = f"{base.layers}.{layer}.{name}"
        if not any(module == target or module.endswith(f".{target}") for target in config.target_modules):
            raise AdapterInvalid(f"{WEIGHTS} has weights for {module}, which target_modules of {CONFIG} leaves out.")


def _part(module: str, target: Target, pair: dict[str, Tensor], config: AdapterConfig) -> LoraPart:
    rank = lookup(config.rank_pattern, module, config.r)
    expected = {"A": [rank, target.in_features], "B": [target.out_features, rank]}
    factors = {}
    for name, shape in expected.items():
        tensor = pair[name]
        if list(tensor.shape) != shape:
            raise AdapterInvalid(
                f"{WEIGHTS}: {module}.lora_{name}.weight: expected shape {shape}, got {list(tensor.shape)}."
            )
        factors[name] = tensor.float().contiguous()
        if not bool(factors[name].isfinite().all()):
            raise AdapterInvalid(f"{WEIGHTS}: {module}.lora_{name}.weight has values that are not finite numbers.")
    alpha = lookup(config.alpha_pattern, module, config.lora_alpha)
    return LoraPart(target.part, factors["A"], factors["B"], config.shape.scale(rank, alpha))
