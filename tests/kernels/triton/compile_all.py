"""Compiles, for a GPU that is not there, every kernel that the ops launch.

`python -m tests.kernels.triton.compile_all 80 bfloat16`: compute capability, and the type of activations.

Nothing runs: launches end after compilation, and tensors lie on the CPU. Writes the name of each kernel.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.triton import launch
from tests.kernels.triton.calls import calls


class Pretended:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def main(capability: int, dtype: torch.dtype) -> None:
    names = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **options | {"warmup": True})

    driver.set_active(Pretended(capability))
    JITFunction.run = compile_only
    launch.DEVICE = "cpu"
    from kernels.triton.ops import TritonOps

    with torch.inference_mode():
        calls(TritonOps(), dtype)
    sys.stdout.write("\n".join(sorted(set(names))))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
