"""Disks and what lies in the model caches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.cli.findings import Finding, size
from runtime.workers.loading.demo import DEMO_NAME, MEMBER, cache_directory

AREA = "storage"

_HUB_PREFIX = "models--"


def find() -> list[Finding]:
    return [
        _directory("cache of Eft", cache_directory()),
        _demo(),
        *_hub(),
        _directory("working directory", Path.cwd()),
    ]


def _directory(name: str, path: Path) -> Finding:
    """Where it is and how much room it has. One that is yet to be made has the room of its parent."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        room = f"{size(shutil.disk_usage(there).free)} free"
    except OSError as error:
        room = f"free space unknown: {error.strerror}"
    notes = [room] + ([] if os.access(there, os.W_OK) else ["not writable"])
    return Finding(AREA, name, f"{path} ({', '.join(notes)})")


def _demo() -> Finding:
    path = cache_directory() / Path(MEMBER).name
    if not path.is_file():
        return Finding(AREA, "demo model", f"not here yet; loading `demo` fetches {DEMO_NAME}")
    return Finding(AREA, "demo model", f"{path.name}, {size(path.stat().st_size)}")


def _hub() -> Iterator[Finding]:
    try:
        from huggingface_hub import constants
    except ImportError:
        yield Finding(AREA, "cache of the hub", "huggingface_hub is not installed")
        return
    cache = Path(constants.HF_HUB_CACHE)
    yield _directory("cache of the hub", cache)
    if not cache.is_dir():
        return
    for model in sorted(cache.glob(f"{_HUB_PREFIX}*")):
        name = model.name.removeprefix(_HUB_PREFIX).replace("--", "/", 1)
        yield Finding(AREA, f"hub model {name}", size(_bytes_in(model / "blobs")))


def _bytes_in(directory: Path) -> int:
    """Of the files there; the hub's snapshots are links to them."""
    total = 0
    for entry in directory.glob("*"):
        try:
            total += entry.stat().st_size
        except OSError:  # deleted meanwhile, or a link to nowhere
            continue
    return total
