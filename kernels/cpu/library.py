"""The compiled kernels in this process: loaded once a variant."""

import functools
from contextlib import suppress

from torch import Tensor

from kernels.cpu.build import BuildError, library
from kernels.cpu.declarations import Kernels, StaleLibraryError, bind, declared
from kernels.cpu.variants import Variant, wanted_variants


def address(x: Tensor | None) -> int:
    """Address of the first value; 0 (null) for None."""
    return 0 if x is None else x.data_ptr()


@functools.cache
def load(variant: Variant) -> Kernels:
    """The compiled variant, ready to call. Raises `BuildError`, or `OSError` when it cannot be loaded."""
    try:
        kernels = bind(library(variant), declared())
    except StaleLibraryError as error:
        raise BuildError(str(error)) from None
    if not kernels.eft_permitted():
        raise OSError(f"the system does not let this process use {variant.name}")
    return kernels


def load_wanted() -> tuple[Variant, Kernels]:
    """The first of `wanted_variants` that builds and loads here: an older compiler lacks the newest instructions, and
    an older system does not permit them. Raises as `load` and `wanted_variants` do."""
    first, *slower = wanted_variants()
    try:
        return first, load(first)
    except (BuildError, OSError):
        for variant in slower:
            with suppress(BuildError, OSError):
                return variant, load(variant)
        raise
