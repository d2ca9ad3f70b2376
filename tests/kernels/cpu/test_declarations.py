"""The boundary between Python and C++: `exports.h`, what libraries export, and what ctypes and the loader refuse."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels.cpu import CpuOps, build
from kernels.cpu import library as loader
from kernels.cpu.build import BuildError, find_compiler, library
from kernels.cpu.declarations import HEADER, DeclarationError, Kernels, StaleLibraryError, bind, declared, parse
from kernels.cpu.variants import usable_variants

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason=f"cpu kernels: {CpuOps.unavailable()}")

VARIANT = usable_variants()[-1]
TEXT = HEADER.read_text(encoding="utf-8")
SILU = "void eft_silu_mul(const float* x, long rows, long inner, float* y, int threads);"
CHANGES = {
    "a type": (SILU, SILU.replace("long rows", "int rows")),
    "the order of arguments": (SILU, SILU.replace("long rows, long inner", "long inner, long rows")),
    "one more argument": (SILU, SILU.replace("int threads", "int threads, int more")),
    "a function less": (f"EXPORT {SILU}", ""),
    "the order of fields": ("    char* keys;\n    char* values;", "    char* values;\n    char* keys;"),
    "a field's type": ("int64_t rope;", "int32_t rope;"),
    "an enum's value": ("BFLOAT16 = 1, INT8 = 2", "BFLOAT16 = 2, INT8 = 1"),
}
changes = pytest.mark.parametrize("change", CHANGES)


def changed(change: str) -> str:
    before, after = CHANGES[change]
    assert TEXT.count(before) == 1
    return TEXT.replace(before, after)


def loaded() -> Kernels:
    return loader.load(VARIANT)


@changes
def test_a_library_of_other_declarations_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = library(VARIANT), parse(changed(change))
    assert other.digest != declared().digest
    with pytest.raises(StaleLibraryError, match=rf"{path}.*\({declared().digest}\).*\({other.digest}\).*restart"):
        bind(path, other)
    # The header was replaced while the process runs: what is compiled is not what was read.
    monkeypatch.setattr(loader, "declared", lambda: other)
    with pytest.raises(BuildError, match="restart the process"):
        loader.load.__wrapped__(VARIANT)


def test_comments_and_spaces_do_not_count() -> None:
    assert parse(TEXT.replace("    char* keys;", "    // the keys\n    char*   keys;")).digest == declared().digest


def test_a_stale_file_is_compiled_again_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Path] = []

    def compile_into(compiler: str, variant: object, target: Path) -> Path:
        compiled.append(target)
        target.write_bytes(library_bytes)
        return target

    library_bytes = library(VARIANT).read_bytes()
    monkeypatch.setattr(build, "_folders", lambda: iter([tmp_path]))
    monkeypatch.setattr(build, "find_compiler", lambda: shutil.which("true"))
    monkeypatch.setattr(build, "_compile", compile_into)
    path = library(VARIANT)
    assert library(VARIANT) == path
    assert len(compiled) == 1, "what is there is taken"
    stale = library_bytes.replace(declared().digest.encode(), b"0" * 16)
    assert stale != library_bytes
    path.write_bytes(stale)
    assert library(VARIANT) == path
    assert len(compiled) == 2
    path.write_bytes(stale)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(BuildError, match="there is no C\\+\\+ compiler"):
        library(VARIANT)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_libraries_export_what_is_declared_and_nothing_else() -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(library(VARIANT))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # Templates of the standard library are visible by its own declaration; the linker adds names with underscores.
    names = {line.split()[0] for line in lines}
    assert {name for name in names if not name.startswith("_")} == set(declared().functions)


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("change", [None, *(change for change in CHANGES if change != "a function less")])
def test_the_compiler_refuses_what_ctypes_reads_otherwise(change: str | None, tmp_path: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None
    source = tmp_path / "checks.cpp"
    source.write_text((parse(changed(change)) if change else declared()).checks)
    command = [compiler, *build.flags(VARIANT), "-fsyntax-only", f"-I{HEADER.parent}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if change in (None, "the order of arguments"):  # of one type: names are in the digest alone
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "static assertion failed" in done.stderr or "static_assert" in done.stderr


def test_arguments_are_checked_where_they_are_passed() -> None:
    kernels, x, y = loaded(), torch.randn(2, 8), torch.empty(2, 4)
    right = (x.data_ptr(), 2, 4, y.data_ptr(), 1)
    kernels.eft_silu_mul(*right)
    found = y.clone()
    kernels.eft_silu_mul(x=x.data_ptr(), rows=2, inner=4, y=y.data_ptr(), threads=1)
    assert torch.equal(found, y)
    assert torch.allclose(found, torch.nn.functional.silu(x[:, :4]) * x[:, 4:], atol=1e-6)
    for count in (0, 4):
        with pytest.raises(TypeError, match="required argument"):
            kernels.eft_silu_mul(*right[:count])
    with pytest.raises(TypeError, match="takes exactly 5 arguments"):
        kernels.eft_silu_mul(*right, 1)
    with pytest.raises(TypeError, match=r"required argument 'rows'"):
        kernels.eft_silu_mul(x.data_ptr(), row=2, inner=4, y=y.data_ptr(), threads=1)
    for place, value in [(0, 1.5), (1, 2.0), (1, None), (3, x), (4, "1")]:
        with pytest.raises(ctypes.ArgumentError):
            kernels.eft_silu_mul(*right[:place], value, *right[place + 1 :])
    with pytest.raises(AttributeError, match="does not declare eft_gone"):
        kernels.eft_gone()


def test_structs_take_their_own_fields_and_types() -> None:
    kernels, structs = loaded(), declared().structs
    wrong = (structs["CacheView"] * 1)()
    with pytest.raises(ctypes.ArgumentError, match="argument 7"):
        kernels.eft_lora_apply(0, 1, 1, 1, 0, 1, wrong, 1)
    with pytest.raises(ctypes.ArgumentError, match="argument 7"):
        kernels.eft_lora_apply(0, 1, 1, 1, 0, 1, ctypes.addressof(wrong), 1)
    with pytest.raises(AttributeError):
        structs["CacheView"]().key = 1
    linear = structs["LinearView"]()
    linear.function = kernels.eft_linear_int4
    with pytest.raises(TypeError):
        linear.function = kernels.eft_silu_mul


@pytest.mark.parametrize(
    "text",
    [
        "struct A { float* x[]; };",
        "struct A { Unknown x; };",
        "struct A { float x = 1; };",
        "enum A : int { X };",
        "EXPORT Unknown eft_a;",
        "EXPORT long eft_a(int x);",
        "EXPORT void eft_a(int);",
        "EXPORT void eft_a(int x, int x);",
        "EXPORT void eft_a(int x); EXPORT void eft_a(int x);",
        "constexpr int A = 1;",
    ],
)
def test_what_has_no_rule_is_refused(text: str) -> None:
    with pytest.raises(DeclarationError):
        parse(text)
