"""The project's files and modules, for tests that read them."""

import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("runtime", "kernels", "settings")


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name of each of our modules → its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def tracked() -> list[Path]:
    """The project's files: what git tracks, and what it would if it were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no git checkout, so which files are the project's is not known")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]
