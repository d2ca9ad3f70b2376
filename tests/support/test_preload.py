"""Torch's library loads on a thread, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.support import preload

PROGRAM = """
import sys
from pathlib import Path
from runtime.support.preload import preload_torch
thread = preload_torch()
thread.join()
assert "torch" not in sys.modules
assert "libtorch_cpu.so" in Path("/proc/self/maps").read_text()
import torch
assert torch.ones(3).sum() == 3
"""


def test_the_library_is_there_before_torch_and_torch_works_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_the_library_the_import_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert preload.preload_torch() is None
