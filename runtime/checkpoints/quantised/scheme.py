"""Storage schemes of linears in integers, and iteration over a checkpoint linear by linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.model.config import ModelLoadError

if TYPE_CHECKING:
    from torch import Tensor

    from kernels import Weight
    from runtime.checkpoints.safetensors_files import WeightFiles


@dataclass(frozen=True)
class Scheme:
    """One storage scheme of linears."""

    name: str
    marks: tuple[str, ...]
    """Ends of names that only a linear's tensors have. The first one that is present identifies a linear."""
    ends: tuple[str, ...]
    """Ends of the names of all its tensors; absent ones are left out."""
    read: Callable[[Mapping[str, Tensor]], Weight]
    """Function of the tensors, by end → the weight [out, in]. Raises `ValueError`, or torch's errors for tensors that
    do not fit together."""


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
            except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
                raise ModelLoadError(f"{base}: not a linear of {scheme.name}: {error}.") from error
        elif not _is_part(name, scheme, known):
            yield name, opened.read(name)
        opened.drop()


def _is_part(name: str, scheme: Scheme, known: set[str]) -> bool:
    """True if a tensor belongs to a linear that another tensor identifies."""
    bases = (name.removesuffix(end) for end in scheme.ends if name.endswith(end))
    return any(base + mark in known for base in bases for mark in scheme.marks)
