"""Facts about the machine, as the system's files have them."""

import pytest

from runtime.support.machine import parse_cpuinfo

X86 = """processor\t: 0
model name\t: Imaginary CPU 9000
flags\t\t: fpu avx avx2 fma avx512f amx_int8

processor\t: 1
model name\t: Another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm\n"


@pytest.mark.parametrize(
    ("text", "model", "sets"),
    [
        (X86, "Imaginary CPU 9000", ["avx", "fma", "avx2", "avx512f", "amx_int8"]),
        (ARM, None, ["asimd", "i8mm"]),
        ("", None, []),
        ("no colon", None, []),
    ],
)
def test_the_processor_as_the_system_describes_it(text: str, model: str | None, sets: list[str]) -> None:
    assert parse_cpuinfo(text) == (model, sets)
