"""Tuning of the C allocator and OpenMP: the temporaries of steps, the memory that a job leaves behind, and the
cores."""

import ctypes
import os
import sys
from collections.abc import Callable

# -- memory ----------------------------------------------------------------------------------------
#
# Tuning of the C allocator: the temporaries of steps, and the memory that a job leaves behind.

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h
_SMALL, _LARGE = 1 << 17, 1 << 30


def share_one_arena() -> bool:
    """Make all later threads allocate in the first thread's arena. False without glibc.

    Call it before the first thread starts: threads with an arena of their own keep it, and later ones then use all
    existing arenas in turn. Then the memory of a job depends on the holes in the arena that its threads get (217 to 281
    MB; 207 to 241 with one arena).
    """
    return _set({_M_ARENA_MAX: 1})


def return_freed_memory() -> bool:
    """Make glibc return large freed blocks to the system at once: while a model is loaded, temporaries of its tensors
    would otherwise stay between the weights as holes. False without glibc."""
    return _set(_thresholds(_SMALL))


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it to the system after every op.

    A layer's temporaries are megabytes large; by default each is mapped, cleared page by page, and unmapped again. On
    SmolLM2 keeping them makes prefill a fifth faster. All threads share one arena: arenas of other threads than the
    first return memory at any threshold. False without glibc.
    """
    return _set(_thresholds(_LARGE))


def _thresholds(size: int) -> dict[int, int]:
    return {_M_MMAP_THRESHOLD: size, _M_TRIM_THRESHOLD: size, _M_ARENA_MAX: 1}


def _set(wanted: dict[int, int]) -> bool:
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(bool(mallopt(key, value)) for key, value in wanted.items())


def _glibc(name: str) -> Callable[..., int] | None:
    """The function of the C library; None without glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return function


def give_back_memory() -> bool:
    """Return free memory to the system, after a large task has ended. False without glibc."""
    trim = _glibc("malloc_trim")
    return trim is not None and bool(trim(0))


# -- openmp ----------------------------------------------------------------------------------------
#
# The time for which torch's waiting threads spin: a setting of its OpenMP runtime, read when torch is imported.
#
# libgomp spins for some milliseconds before it sleeps. That takes cores from the C++ ops, which have threads of their
# own, and from other processes. Beside a process that keeps all cores busy, every parallel op of torch then lasts as
# long as the system lets that process run.

SPINS = "10000"
"""Number of spins, some tenths of a millisecond: training is as fast as with libgomp's own 300,000; with 2,000 it is 3
% slower."""


def limit_spinning() -> None:
    """Limit the spinning of torch's threads. No effect where the environment sets a policy, or where torch is already
    imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
