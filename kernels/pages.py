"""Memory in pages of 2 MB, where the system has them."""

import mmap
from contextlib import suppress


def mapped(size: int) -> mmap.mmap:
    """`size` bytes of zeros of this process's own.

    Mapped, not allocated: the system hands out pages when they are first touched, so what is not used costs no memory;
    large ones make that first touch cheap, and are found faster.
    """
    # Shared memory, which is what mmap gives when it is not told otherwise, has small pages only.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # not every system has large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
