"""Whether the C++ ops are there: all tests of them are skipped where they cannot be."""

import sys

import pytest

from kernels.cpu import CpuOps
from kernels.cpu.build import find_compiler


@pytest.mark.skipif(find_compiler() is None or sys.platform != "linux", reason="needs Linux and a C++ compiler")
def test_where_there_is_a_compiler_the_ops_can_be_used() -> None:
    assert CpuOps.unavailable() is None
