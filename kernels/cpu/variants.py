"""The instruction sets that the kernels are compiled for, and which of them this processor has."""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "EFT_KERNELS_VARIANT"
"""Environment variable that forces one variant, for tests and measurements."""

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Variant:
    """One way to compile the sources."""

    name: str
    flags: tuple[str, ...]
    """Arguments of the compiler."""
    needs: frozenset[str]
    """Flags of the processor, as Linux names them."""


PLAIN = Variant("plain", (), frozenset())
"""Instructions that every processor of the architecture has: SSE2 on x86-64, NEON on aarch64."""
_AVX2 = Variant("avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"}))
_AVX512 = Variant(
    "avx512",
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"}),
)
_VNNI = Variant("avx512vnni", (*_AVX512.flags, "-mavx512vnni"), _AVX512.needs | {"avx512_vnni"})
X86 = (
    _AVX2,
    Variant("avxvnni", (*_AVX2.flags, "-mavxvnni"), _AVX2.needs | {"avx_vnni"}),
    _AVX512,
    _VNNI,
    Variant(
        "amx",
        (*_VNNI.flags, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        _VNNI.needs | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    ),
)


def all_variants() -> list[Variant]:
    """Variants of this architecture, from slowest to fastest."""
    return [PLAIN, *X86] if platform.machine() in ("x86_64", "AMD64") else [PLAIN]


def usable_variants() -> list[Variant]:
    """Variants that this processor can run, from slowest to fastest."""
    flags = processor_flags()
    return [variant for variant in all_variants() if variant.needs <= flags]


def wanted_variants() -> list[Variant]:
    """The variant that the environment names, else all that can run here, fastest first. Raises `ValueError` when the
    named one cannot run here."""
    usable = {variant.name: variant for variant in usable_variants()}
    name = os.environ.get(VARIABLE)
    if not name:
        return list(usable.values())[::-1]
    if name not in usable:
        raise ValueError(f"{VARIABLE} is {name!r}; this processor can run: {', '.join(usable)}")
    return [usable[name]]


def processor_flags() -> frozenset[str]:
    """Features that the processor has and the system permits; empty where they are unknown."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
