"""Reading an adapter's files from a folder that may be anybody's: plain files of a bounded size, no links."""

import os
import stat
from pathlib import Path

from runtime.workers.loading.peft.errors import AdapterInvalid
from runtime.workers.loading.peft.names import CONFIG, WEIGHTS

MAX_CONFIG = 1 << 20
"""Bytes of an adapter_config.json."""


def read_config(directory: Path) -> bytes:
    """The bytes of the configuration. Raises `AdapterInvalid`."""
    return _read(directory, CONFIG, MAX_CONFIG)


def read_weights(directory: Path, limit: int) -> bytes:
    """The bytes of the weights, at most `limit`. Raises `AdapterInvalid`.

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
        # Neither follows a link nor waits for the other end of a pipe.
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterInvalid(f"The adapter has no {name}.") from None
    except OSError as error:
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
        data = file.read(limit + 1)
    if len(data) > limit:
        raise AdapterInvalid(f"The adapter's {name} has more than {limit} bytes.")
    return data
