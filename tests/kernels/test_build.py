"""Whether the C++ ops are there: all tests of them are skipped where they cannot be."""

import sys
from pathlib import Path
from threading import Event

import pytest

from kernels import build
from kernels.cpu import CpuOps
from kernels.cpu.build import BuildError, find_compiler
from kernels.cpu.variants import Variant, all_variants


@pytest.mark.skipif(find_compiler() is None or sys.platform != "linux", reason="needs Linux and a C++ compiler")
def test_where_there_is_a_compiler_the_ops_can_be_used() -> None:
    assert CpuOps.unavailable() is None


def test_each_variant_is_reported_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiling takes minutes on a busy machine: the last variant here is done only when another one was reported."""
    names = [variant.name for variant in all_variants()]
    reported = Event()
    say = build._say

    def compile_one(variant: Variant) -> Path:
        if len(names) > 1 and variant.name == names[-1]:
            assert reported.wait(60)
            raise BuildError("it does not compile")
        return Path(f"{variant.name}.so")

    def said(text: str) -> None:
        say(text)
        if text.startswith("1 of "):
            reported.set()

    monkeypatch.setattr(build, "find_compiler", lambda: "c++")
    monkeypatch.setattr(build, "library", compile_one)
    monkeypatch.setattr(build, "_say", said)
    assert build.main() == (1 if len(names) > 1 else 0)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"eft: compiling C++ kernels for {', '.join(names)}; once, and it may take minutes"
    assert [line.split()[1:4] for line in lines] == [[str(n + 1), "of", str(len(names))] for n in range(len(names))]
    assert {line.split(": ")[-2] for line in lines} == set(names)
    if len(names) > 1:
        assert lines[-1].endswith(f"{names[-1]}: it does not compile")
