"""The build that checks itself finds errors: ops are called here with sizes and addresses that are wrong."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.cpu.build import SANITIZE

pytestmark = pytest.mark.skipif(os.environ.get(SANITIZE) != "1", reason="runs under .ci/sanitize")

SCRIPT = """
import torch
from kernels.cpu.library import load
from kernels.cpu.variants import usable_variants
lib = load({{variant.name: variant for variant in usable_variants()}}[{variant!r}])
x, weight, y = torch.ones(3, 40), torch.ones(40), torch.empty(3, 40)
def norm(x, rows, size, weight, y):
    lib.eft_rms_norm(x, 40, rows, size, weight, 0.0, 1e-5, y, 1)
norm(x.data_ptr(), 3, 40, weight.data_ptr(), y.data_ptr())
print("right", flush=True)
norm({call})
"""
WRONG = {
    "x.data_ptr(), 3, 41, weight.data_ptr(), y.data_ptr()": "heap-buffer-overflow",
    "x[1:].data_ptr(), 3, 40, weight.data_ptr(), y.data_ptr()": "heap-buffer-overflow",
    "x.data_ptr(), 3, 40, weight.data_ptr(), y[1:].data_ptr()": "heap-buffer-overflow",
    "x.data_ptr(), 3, 40, weight.data_ptr() + 2, y.data_ptr()": "misaligned address",
}


@pytest.mark.parametrize("call", WRONG)
def test_it_ends_the_process(call: str) -> None:
    variant = os.environ["EFT_TEST_VARIANTS"].split(",")[0]
    script = SCRIPT.format(variant=variant, call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode != 0) == ("right\n", True)
    assert WRONG[call] in done.stderr


def test_fresh_memory_is_no_number() -> None:
    assert torch.empty(1000).isnan().all()
