"""Which scheme a config.json asks for, and going through a checkpoint linear by linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.workers.loading.errors import ModelLoadError

if TYPE_CHECKING:
    from torch import Tensor

    from kernels import Weight
    from runtime.workers.loading.safetensors_files import WeightFiles

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Scheme:
    """One way to store a linear."""

    name: str
    marks: tuple[str, ...]
    """Ends of names that only a linear's tensors have. The first that is there tells of one."""
    ends: tuple[str, ...]
    """Ends of the names of all its tensors; those that are not there are left out."""
    read: Callable[[Mapping[str, Tensor]], Weight]
    """By end → the weight [out, in]. Raises `ValueError`."""


def find_scheme(config: Config) -> Scheme | None:
    """The scheme of a model's config.json; None: floating point. Raises `ModelLoadError` naming what is supported."""
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise ModelLoadError(f"config.json: quantization_config must be an object, got {type(given).__name__}.")
    # Imported where they are used: each needs torch.
    from runtime.workers.loading.quantised import awq, bitsandbytes, gptq

    schemes = {"gptq": gptq.scheme, "awq": awq.scheme, "bitsandbytes": bitsandbytes.scheme}
    method = given.get("quant_method")
    if method not in schemes:
        raise ModelLoadError(
            f"Weights quantised with {method!r} cannot be loaded; supported are: {', '.join(schemes)}, the float32, "
            "float16 and bfloat16 checkpoints of a model, and GGUF files."
        )
    try:
        return schemes[method](given)
    except ValueError as error:
        raise ModelLoadError(f"config.json: quantization_config: {error}.") from None


def weights(files: WeightFiles, scheme: Scheme) -> Iterator[tuple[str, Weight]]:
    """Names and weights as an ordinary checkpoint has them, one linear in memory at a time. Raises `ModelLoadError`."""
    opened = files.open()
    names = [name for some in files.names.values() for name in some]
    known = set(names)
    for name in names:
        base = next((name.removesuffix(mark) for mark in scheme.marks if name.endswith(mark)), None)
        if base is not None:
            tensors = {end: opened.read(base + end) for end in scheme.ends if base + end in known}
            try:
                yield f"{base}.weight", scheme.read(tensors)
            except ValueError as error:
                raise ModelLoadError(f"{base}: not a linear of {scheme.name}: {error}.") from error
        elif not _is_part(name, scheme, known):
            yield name, opened.read(name)
        opened.drop()


def _is_part(name: str, scheme: Scheme, known: set[str]) -> bool:
    """Whether a tensor belongs to a linear that another one tells of."""
    bases = (name.removesuffix(end) for end in scheme.ends if name.endswith(end))
    return any(base + mark in known for base in bases for mark in scheme.marks)
