"""Python code in a process of its own under the system's own limits: what a full disk and no descriptors really do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
"""No file may grow beyond `size` bytes: EFBIG, where a full disk says ENOSPC. Python ignores the signal by itself."""

NO_DESCRIPTORS = (
    "import os, resource\n"
    "def no_descriptors():\n"
    "    last = os.open('/dev/null', os.O_RDONLY)\n"
    "    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
    "    return last\n"
    "def descriptors():\n"
    "    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    "    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))\n"
)
"""`no_descriptors()`: none can be opened from here on, up to `descriptors()`."""


def run_limited(code: str, *arguments: object, seconds: float = 120) -> str:
    """Run the code and return its output; its arguments are in `sys.argv`. A failure shows its stderr."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
