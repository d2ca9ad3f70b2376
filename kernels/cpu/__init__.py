"""The ops in C++ for CPUs: one source, compiled for each instruction set.

`python -m kernels.build` compiles it; what is not compiled yet when it is needed is compiled then.
"""

from kernels.cpu.ops import CpuOps

__all__ = ["CpuOps"]
