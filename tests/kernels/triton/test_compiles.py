"""The kernels compile for GPUs, which the interpreter does not show: it takes Python that Triton does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_decode", "_expand", "_expand_row", "_flat", "_fold", "_gated", "_gradient", "_grouped", "_int8", "_merge_splits",
    "_prefill", "_quantise_groups", "_quantise_rotated", "_rms_norm", "_rope_and_cache", "_sample", "_shrink",
    "_shrink_row", "_temper",
}  # fmt: skip


def test_every_kernel_compiles_for_ampere(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.triton.compile_all", "80", "bfloat16"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == KERNELS
