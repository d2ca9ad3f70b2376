"""Compiles the C++ kernels, when they are installed (`kernels.build`) or when they are first needed.

A library's name holds a digest of the sources, the flags and the compiler, so a stale one is never loaded.
It is written beside a temporary name and renamed: several processes may build at once. It goes into this
package where that can be written, else into the user's cache.

Every library also holds the digest of the declarations that it was compiled from (`declarations.py`). A file with
another digest, whatever its name says, is compiled again, or refused where there is no compiler.

With `EFT_KERNELS_SANITIZE=1` the same sources are compiled to check themselves (`.ci/sanitize`).
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernels.cpu.declarations import declared, holds
from kernels.cpu.variants import Variant

_log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas",
)  # fmt: skip
SANITIZE = "EFT_KERNELS_SANITIZE"
"""Environment variable: anything but 0 and nothing gives a library that ends the process where it errs."""
CHECKS = (
    "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
)  # fmt: skip
"""Flags of that build, beside `FLAGS`; the process must have loaded AddressSanitizer's runtime before all else."""
TIMEOUT = 300.0
"""Seconds for one variant; it usually takes five, and thirty with `CHECKS`."""


class BuildError(RuntimeError):
    """The kernels are not compiled, and cannot be; the message gives the reason."""


def library(variant: Variant) -> Path:
    """The compiled variant, compiled now if it is not there. Raises `BuildError`."""
    compiler = find_compiler()
    if compiler is None:
        # Without a compiler, any build of these same sources will do.
        for folder in _folders():
            for found in sorted(folder.glob(f"{_stem(variant)}-*.so")):
                if holds(found, declared().digest):
                    return found
        raise BuildError("not compiled, and there is no C++ compiler (g++ or clang++, or name one in CXX)")
    name = f"{_stem(variant)}-{_digest(_version(compiler))}.so"
    for folder in _folders():
        if (folder / name).is_file() and holds(folder / name, declared().digest):
            return folder / name
    return _compile(compiler, variant, _writable_folder() / name)


def find_compiler() -> str | None:
    """Path of the C++ compiler: the one in CXX, else g++ or clang++."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "c++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def sources() -> list[Path]:
    """The C++ files of the library, sorted."""
    return sorted(HERE.glob("*.cpp"))


def flags(variant: Variant) -> tuple[str, ...]:
    """The compiler's arguments, but for the sources and the output."""
    return (*FLAGS, *(CHECKS if _sanitised() else ()), *variant.flags)


def _sanitised() -> bool:
    return os.environ.get(SANITIZE, "0") not in ("", "0")


def _family(variant: Variant) -> str:
    """Prefix of the names of all builds of a variant."""
    return f"sanitised-{variant.name}" if _sanitised() else variant.name


def _stem(variant: Variant) -> str:
    texts = [path.read_bytes() for path in [*sources(), *sorted(HERE.glob("*.h"))]]
    texts += [declared().checks.encode(), " ".join(flags(variant)).encode()]
    return f"{_family(variant)}-{platform.machine()}-{_digest(*texts)}"


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {compiler} does not work: {error}") from None


def _folders() -> Iterator[Path]:
    yield HERE / "built"
    yield _cache() / "kernels"


def _cache() -> Path:
    """Eft's folder of files that can be made again: $EFT_CACHE_DIR, else `eft` under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("EFT_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eft"


def _writable_folder() -> Path:
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise BuildError(f"no place to keep the compiled kernels: {', '.join(map(str, _folders()))} cannot be written")


def _compile(compiler: str, variant: Variant, target: Path) -> Path:
    _log.info("Compiling the C++ kernels for %s: once, for up to a minute.", variant.name)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        out = Path(folder) / target.name
        checks = Path(folder) / "checks.cpp"
        checks.write_text(declared().checks, encoding="utf-8")
        command = [compiler, *flags(variant), f"-I{HERE}", str(checks), *map(str, sources()), "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"compiling {variant.name} failed: {error}") from None
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise BuildError(f"compiling {variant.name} with {compiler} failed: {first}")
        out.replace(target)
    for old in target.parent.glob(f"{_family(variant)}-*.so"):
        if old != target and old.stat().st_mtime < target.stat().st_mtime - 86400:
            old.unlink(missing_ok=True)
    return target
