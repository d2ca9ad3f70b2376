"""First weights of a run that are not drawn: those of an adapter to go on from, and those made from the base's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from runtime.adapters.card import read_card, write_card
from runtime.adapters.store import name_problem, split_version
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.peft import AdapterInvalid, read_adapter, read_config, read_files
from runtime.errors import Forbidden, InvalidRequest, StorageUnavailable
from runtime.model.families import find_model, is_native
from runtime.model.layers import Linear
from runtime.model.lora import Adapter, LoraLayers, LoraPart, LoraShape
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.support.durable import fresh_directory, pinned, reason, write_file
from runtime.support.module_patterns import ModulePattern
from runtime.trainer.lora import mix, parameters_of
from runtime.trainer.plan.plan import AdapterOrigin
from runtime.trainer.plan.served_model import ModelShape, resolve_targets
from runtime.trainer.recipe import Recipe

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary

KEY = "lora_model_dir"
_TARGET_KEYS = ("lora_target_modules", "lora_target_linear", "peft_layers_to_transform")
MAX_SHOWN = 200
"""Characters of a value in a message."""
LABEL = "label.json"
"""File in a job's copy of the adapter: its label."""


# -- going on --------------------------------------------------------------------------------------
#
# `lora_model_dir`: the adapter that a job goes on from. The job keeps a copy: what the name means may change.


def find_origin(name: str, library: AdapterLibrary, roots: Sequence[Path], base: LoraBase) -> AdapterOrigin:
    """The adapter that a recipe calls `name`: one of the library, or a folder under a data root. Raises
    `InvalidRequest` and `Forbidden`."""
    if (found := _published(name, library, base)) is not None:
        return found
    outside = "\0" in name or len(name) > 4096
    for root in [] if outside else roots:
        within = os.path.realpath(root)
        path = Path(os.path.realpath(os.path.join(within, name)))
        if not path.is_relative_to(within):
            outside = True
        elif path.is_dir():
            return AdapterOrigin(path, path.name)
    names = ", ".join(record.name for record in library.list()[:20]) or "none"
    if outside and ("/" in name or name.startswith(".")):
        raise Forbidden(
            f"{KEY} is {name[:200]!r}, a folder outside of the data roots (trainer.data_roots), which is not read. "
            f"Adapters of this server: {names}.",
            param=KEY,
        )
    raise InvalidRequest(
        f"{KEY} is {name[:200]!r}, which is neither an adapter of this server ({names}) nor a folder under a data root "
        "(trainer.data_roots).",
        param=KEY,
        code="adapter_not_found",
    )


def _published(name: str, library: AdapterLibrary, base: LoraBase) -> AdapterOrigin | None:
    asked, number = split_version(name) or (name, None)
    record = library.find(asked) if name_problem(asked) is None else None
    if record is None:
        return None
    version = record.version if number is None else record.versions.get(number)
    if version is None:
        there = ", ".join(map(str, sorted(record.versions)))
        raise InvalidRequest(f"{KEY} is {name!r}, but {asked} has the versions {there}.", param=KEY)
    if version.base != base.fingerprint:
        raise InvalidRequest(
            f"{KEY} is {name!r}: {version.id} was trained on other weights than those of {base.name}, which is served.",
            param=KEY,
        )
    return AdapterOrigin(Path(os.path.realpath(library.directory(version))), version.id)


@contextmanager
def pinned_origin(origin: AdapterOrigin) -> Iterator[AdapterOrigin]:
    """Context with the adapter that `find_origin` found, to be read: whatever is put into its place meanwhile, it is
    the folder that is opened now. Raises `InvalidRequest`."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(pinned(origin.directory))
        except OSError as error:
            raise InvalidRequest(
                f"{KEY} ({origin.label}): the folder cannot be opened: {reason(error)}.", param=KEY
            ) from error
        yield AdapterOrigin(folder, origin.label)


def keep_origin(origin: AdapterOrigin, folder: Path, base: LoraBase, *, max_rank: int) -> AdapterOrigin:
    """The same adapter as a copy in a job's folder. Raises `StorageUnavailable` and `InvalidRequest`."""
    try:
        files = read_files(origin.directory, base, max_rank=max_rank)
        with fresh_directory(folder) as partial:
            for name, data in files.items():
                write_file(partial / name, data)
            write_card(partial, read_card(origin.directory))
            write_file(partial / LABEL, msgspec.json.encode(origin.label))
    except AdapterInvalid as error:
        raise _unfit(origin, error) from error
    except OSError as error:
        raise StorageUnavailable(f"{origin.label} cannot be copied: {reason(error)}.", param=KEY) from error
    return AdapterOrigin(folder, origin.label)


def kept_origin(folder: Path) -> AdapterOrigin | None:
    """The copy in a job's folder; None where there is none."""
    try:
        return AdapterOrigin(folder, msgspec.json.decode((folder / LABEL).read_bytes(), type=str))
    except (OSError, msgspec.MsgspecError):
        return None


def going_on(recipe: Recipe, origin: AdapterOrigin, base: LoraBase, shape: ModelShape, *, max_rank: int) -> Recipe:
    """The recipe with what the adapter decides: rank, alpha, kind, targets, and the chat template where the recipe
    names none. Raises `InvalidRequest` where the two are at odds, or the adapter does not fit the base."""
    try:
        adapter = read_adapter(origin.directory, base, max_rank=max_rank)
    except AdapterInvalid as error:
        raise _unfit(origin, error) from error
    if adapter.vocabulary is not None:
        raise InvalidRequest(
            f"{KEY}: {origin.label} has rows of the embedding or the head (modules_to_save, trainable_token_indices), "
            "which a job cannot go on from; low-rank adapters alone can be.",
            param=KEY,
        )
    targets = _targets(adapter, base)
    decided = _decided(adapter, targets, base)
    for key, value in decided.items():
        own = getattr(recipe, key)
        if key not in recipe.left_out and own != value:
            raise InvalidRequest(
                f"{key} is {_shown(own)}, but {origin.label}, from which the job goes on ({KEY}), has {_shown(value)}: "
                "it must be that, or be left out.",
                param=key,
            )
    given = next((key for key in _TARGET_KEYS if key not in recipe.left_out), None)
    if given is not None:
        _check_targets(recipe, given, targets, origin.label, shape)
    notes = (*recipe.notes, *_notes(origin, base))
    template = read_card(origin.directory).chat_template
    named = recipe.chat_template or recipe.chat_template_jinja
    if template is not None and named is None:
        recipe = msgspec.structs.replace(recipe, chat_template="jinja", chat_template_jinja=template)
        notes = (*notes, f"Chats are rendered by the template that goes with {origin.label}.")
    modules = tuple(f"{base.layers}.{layer}.{name}" for layer, name in targets)
    return msgspec.structs.replace(
        recipe,
        lora_target_modules=modules,
        lora_target_linear=None,
        peft_layers_to_transform=None,
        notes=notes,
        **decided,
    )


def _unfit(origin: AdapterOrigin, error: AdapterInvalid) -> InvalidRequest:
    return InvalidRequest(f"{KEY} ({origin.label}): {error.message}", param=KEY, code=error.code)


def _decided(adapter: Adapter, targets: Sequence[tuple[int, str]], base: LoraBase) -> dict[str, Any]:
    shape = adapter.shape
    modules = [f"{base.layers}.{layer}.{name}" for layer, name in targets]
    return {
        "lora_r": shape.rank,
        "lora_alpha": float(shape.alpha),
        "lora_rank_pattern": _used(shape.rank_pattern, modules),
        "lora_alpha_pattern": _used(shape.alpha_pattern, modules),
        "peft_use_rslora": shape.rslora,
        "peft_use_dora": shape.dora,
    }


def _used(pattern: Mapping[str, float], modules: Sequence[str]) -> dict[str, float]:
    """The pattern without keys that mean nothing."""
    absent = set(ModulePattern("pattern", pattern).unmatched(modules))
    return {key: value for key, value in pattern.items() if key not in absent}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
        return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _targets(adapter: Adapter, base: LoraBase) -> list[tuple[int, str]]:
    """The adapted linears: layer, and name within it."""
    names = {place: name for name, place in base.places.items()}
    return sorted(
        (layer, names[linear, part.part]) for (layer, linear), some in adapter.layers.items() for part in some
    )


def _check_targets(recipe: Recipe, key: str, targets: Sequence[tuple[int, str]], label: str, shape: ModelShape) -> None:
    wanted = set(resolve_targets(recipe, shape))
    if wanted == set(targets):
        return
    names = sorted({name.rpartition(".")[2] for _, name in targets})
    layers = len({layer for layer, _ in targets})
    raise InvalidRequest(
        f"{key} names other linears than {label}, from which the job goes on ({KEY}), which adapts {', '.join(names)} "
        f"in {layers} layers: it must name these, or be left out.",
        param=key,
    )


def _notes(origin: AdapterOrigin, base: LoraBase) -> list[str]:
    try:
        config = msgspec.json.decode(read_config(origin.directory), type=dict[str, Any])
    except (AdapterInvalid, msgspec.MsgspecError):  # changed since it was read
        config = {}
    named = str(config.get("base_model_name_or_path") or "")
    notes = [f"The job goes on from {origin.label}."]
    if "@" not in origin.label and named.rstrip("/").rpartition("/")[2].lower() != base.name.lower():
        notes.append(
            f"{origin.label} says that it was made for {named[:200]!r}; its shapes are those of {base.name}, which is "
            "served. Make sure that the weights are the same."
        )
    return notes


def origin_parameters(origin: AdapterOrigin, base: LoraBase, *, max_rank: int) -> dict[str, Tensor]:
    """The adapter's weights, by the names of the run's parameters. Raises `AdapterInvalid`."""
    return parameters_of(read_adapter(origin.directory, base, max_rank=max_rank).layers)


# -- made from the base ----------------------------------------------------------------------------
#
# As PEFT's `init_lora_weights` has it. PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) begin with a part of the
# weight, LoftQ (arXiv:2310.08659) with what rounding took from it.


class Stopped(Exception):
    """The run is no longer wanted."""


class BaseWeights(NamedTuple):
    """The base's weights, to make an adapter's from."""

    checkpoint: Checkpoint
    """Its own files, from before any rounding."""
    base: LoraBase
    served: Model
    """The model as it is served; whole, for LoftQ."""


def made_parameters(
    recipe: Recipe,
    shape: LoraShape,
    targets: Mapping[tuple[int, str], Sequence[str]],
    weights: BaseWeights,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor] | None:
    """First weights of PiSSA, OLoRA or LoftQ, by the names of the run's parameters; None where LoftQ finds nothing that
    was rounded. One weight of the base is in memory at a time. Raises `InvalidRequest`, and `Stopped` when that says
    so."""
    places = {
        f"{weights.base.module(layer, linear, part)}.weight": (layer, linear, part)
        for (layer, linear), parts in targets.items()
        for part in parts
    }
    found: dict[tuple[int, str, str], LoraPart] = {}
    for name, weight in weights.checkpoint.tensors():
        place = places.get(_full_name(name, weights.base))
        if place is None:
            continue
        if stopped():
            raise Stopped
        if recipe.first_weights == "loftq" and not isinstance(weight, Tensor):
            raise InvalidRequest(
                f"peft_init_lora_weights is loftq, but the base's own files hold {name} in integers: what rounding "
                "took is not known. Leave it out, or serve the model that they were made from, with "
                "model.quantization.",
                param="peft_init_lora_weights",
            )
        whole = (weight if isinstance(weight, Tensor) else weight.dequantise()).float()
        size = shape.at(weights.base.module(*place))
        found[place] = _made(recipe, size, place, _matrix(whole, place, weights, recipe))
    if missing := next((name for name, place in places.items() if place not in found), None):
        raise InvalidRequest(f"The base's files have no tensor {missing}, from which {recipe.first_weights} begins.")
    if all(not part.b.any() for part in found.values()):
        return None
    layers: LoraLayers = {
        (layer, linear): [found[layer, linear, part] for part in parts] for (layer, linear), parts in targets.items()
    }
    return parameters_of(layers)


def _full_name(name: str, base: LoraBase) -> str:
    prefix = base.layers.partition(".")[0] + "."
    return name if name.startswith(prefix) else prefix + name


def _matrix(stored: Tensor, place: tuple[int, str, str], weights: BaseWeights, recipe: Recipe) -> Tensor:
    """The weight that the factors are made from [out, in]: the base's, or for LoftQ what rounding took."""
    config = weights.checkpoint.config
    if is_native(config) and find_model(config).TRANSPOSED:
        stored = stored.t()
    if recipe.first_weights != "loftq":
        return stored.contiguous()
    layer, linear_name, part = place
    linear: Linear = weights.served.layers[layer].linears[linear_name]
    start = linear.weight.starts[part]
    return stored - linear.weight.rows(start, start + linear.parts[part]).cpu()


def _made(recipe: Recipe, size: tuple[int, float], place: tuple[int, str, str], matrix: Tensor) -> LoraPart:
    (rank, scale), (layer, linear, part) = size, place
    generator = torch.Generator().manual_seed(mix(recipe.seed, layer, sum(f"{linear} {part}".encode())))
    a, b = _factors_of(recipe.first_weights, matrix, rank, scale, generator)
    return LoraPart(part, a, b, scale)


def _factors_of(
    initial: str, weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of PiSSA or OLoRA for weight [out, in] float32, by PEFT's formulas; or of LoftQ,
    for a `weight` that is what rounding took."""
    if initial == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    left, sizes, right = _largest(initial, weight, rank, generator)
    root = (sizes / scale).sqrt()
    return root.unsqueeze(1) * right, left * root


def _largest(initial: str, weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [rank], and their vectors [out, rank] and [rank, in]."""
    passes = _passes(initial)
    if passes is None:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    # Randomised (arXiv:0909.4061, algorithm 4.4): as `torch.svd_lowrank`, which draws from the global generator.
    basis = torch.linalg.qr(weight @ torch.randn(weight.shape[1], rank, generator=generator).to(weight))[0]
    for _ in range(passes):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis)[0])[0]
    left, sizes, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return basis @ left, sizes, right


def _passes(initial: str) -> int | None:
    """Passes of PiSSA's fast decomposition, `pissa_niter_16`; None for another kind."""
    _, _, count = initial.partition("pissa_niter_")
    return int(count) if count else None
