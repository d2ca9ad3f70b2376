"""How the C allocator treats the temporaries of steps, and what a job leaves behind."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h
_SMALL, _LARGE = 1 << 17, 1 << 30


def share_one_arena() -> bool:
    """Have all threads to come allocate where the first one does. False without glibc.

    Belongs before the first thread: those that have an arena of their own keep it, later ones then take turns with
    all that there are, and what a job takes depends on which thread met whose holes (217 to 281 MB; 207 to 241 so).
    """
    return _set({_M_ARENA_MAX: 1})


def return_freed_memory() -> bool:
    """Have glibc give large freed blocks back to the system at once: while a model is loaded, what is made of a tensor
    on its way would else stay between the weights as holes. False without glibc."""
    return _set(_thresholds(_SMALL))


def keep_freed_memory() -> bool:
    """Have glibc reuse freed memory instead of giving it back to the system after every op.

    A layer's temporaries are megabytes large; by default each is mapped, cleared page by page, and
    unmapped again. On SmolLM2 keeping them makes prefill a fifth faster. All threads share one arena: those of
    other threads than the first give memory back whatever the threshold is. False without glibc.
    """
    return _set(_thresholds(_LARGE))


def _thresholds(size: int) -> dict[int, int]:
    return {_M_MMAP_THRESHOLD: size, _M_TRIM_THRESHOLD: size, _M_ARENA_MAX: 1}


def _set(wanted: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(bool(mallopt(key, value)) for key, value in wanted.items())


def give_back_memory() -> bool:
    """Return what is free to the system, after something large has ended. False without glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    return bool(trim(0))
