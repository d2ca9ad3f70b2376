"""A version's folder: how it comes to be, what its digest is, and what is left behind by crashes."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.durable import PARTIAL, fresh_directory, sync_directory, write_file
from runtime.workers.loading.peft import FILES, AdapterInvalid, read_adapter, read_files
from runtime.workers.lora_base import LoraBase

Source = Path | Callable[[Path], None]
"""A folder with an adapter's files, or what writes one to a folder that does not exist yet."""


def stage(source: Source, directory: Path, base: LoraBase, *, max_rank: int) -> int:
    """Bring an adapter's files to `directory`, checked and on the disk; returns its rank. Blocks.

    Copies them, so that what is served cannot be changed by whoever has the source. Raises `AdapterInvalid`,
    and `OSError` when the disk is full.
    """
    written = None
    if not isinstance(source, Path):
        written = directory.with_name(f"{directory.name}{PARTIAL}written")
        source(written)
    try:
        with fresh_directory(directory) as partial:
            files = read_files(written or _folder(source), base, max_rank=max_rank)
            for name, data in files.items():
                write_file(partial / name, data)
            rank = read_adapter(partial, base, max_rank=max_rank).rank
        sync_directory(directory.parent.parent)
    finally:
        if written is not None:
            shutil.rmtree(written, ignore_errors=True)
    return rank


def _folder(source: Source) -> Path:
    if not isinstance(source, Path) or not source.is_dir():
        raise AdapterInvalid("The adapter must be a folder, as PEFT's save_pretrained writes it.")
    return source


def digest(directory: Path) -> str:
    """SHA-256 over the files' names and contents, in hexadecimal. Raises `OSError`."""
    total = hashlib.sha256()
    for name in FILES:
        data = (directory / name).read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def sweep(root: Path, live: Iterable[Path]) -> list[str]:
    """Delete what no row knows: versions that were not finished, and ones that were deleted. Returns their names."""
    keep = set(live)
    swept = []
    for directory in sorted(path for path in root.glob("*/*") if path not in keep):
        number, *partial = directory.name.split(PARTIAL)
        if number.isdigit() and len(partial) < 2 and not directory.is_symlink():
            shutil.rmtree(directory, ignore_errors=True)
            swept.append(f"{directory.parent.name}/{directory.name}")
    return swept
