"""The files of a checkpoint against the sums that there are of them.

A sum is in a file `SHA256SUMS` (as sha256sum writes it), in the name of the blob that a file of the hub's cache points
to, or in what `hf download --local-dir` notes beside a file.
"""

import hashlib
import re
from pathlib import Path

from runtime.verification.report import Check

SUMS = "SHA256SUMS"
NOTES = ".cache/huggingface/download"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


def check_files(source: Path) -> list[Check]:
    """Of a model's directory, or of a single file."""
    directory = source if source.is_dir() else source.parent
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    listed = _listed(directory / SUMS)
    checks = []
    for file in files:
        expected = listed.get(file.name) or _blob(file) or _noted(directory, file)
        size = f"{file.stat().st_size} bytes"
        if expected is None:
            checks.append(Check(file.name, f"{size}, no sum to compare with"))
        elif _sum(file) == expected:
            checks.append(Check(file.name, f"{size}, sha256 as it should be"))
        else:
            checks.append(Check(file.name, f"{size}, but its sha256 is not {expected}", ok=False))
    absent = [name for name in listed if not (directory / name).is_file()] if source.is_dir() else []
    return checks + [Check(name, f"named in {SUMS}, and not there", ok=False) for name in absent]


def _listed(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {parts[1].lstrip("*"): parts[0].lower() for parts in lines if len(parts) == 2}


def _blob(file: Path) -> str | None:
    name = file.resolve().name
    return name if file.is_symlink() and _SHA256.fullmatch(name) else None


def _noted(directory: Path, file: Path) -> str | None:
    """The second line of a note is the file's ETag: its SHA-256, for files as large as weights."""
    note = directory / NOTES / f"{file.name}.metadata"
    if not note.is_file():
        return None
    lines = note.read_text(encoding="utf-8").splitlines()
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
