"""The machine: processor, memory, GPU, compiler."""

import os
import platform
import shutil
from pathlib import Path

import psutil

from runtime.cli.findings import Finding, size

AREA = "machine"

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# In the order in which they came; those that a kernel here or in torch is chosen by.
_INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def find() -> list[Finding]:
    return [
        Finding(AREA, "system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *_processor(),
        *_memory(),
        _gpu(),
        _compiler(),
    ]


def _processor() -> list[Finding]:
    info = _read_cpuinfo()
    model = info.get("model name") or platform.processor() or "unknown"
    flags = set((info.get("flags") or info.get("Features") or "").split())
    known = [name for name in _INSTRUCTION_SETS if name in flags]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(AREA, "processor", model),
        Finding(AREA, "cores", f"{usable} usable of {os.cpu_count()}"),
        Finding(AREA, "instruction sets", ", ".join(known) or "unknown"),
    ]


def _read_cpuinfo() -> dict[str, str]:
    """The first processor's lines; empty on systems without such a file."""
    try:
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [Finding(AREA, "memory", f"{size(memory.available)} available of {size(memory.total)}")]
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return found
    if limit.isdigit():
        found.append(Finding(AREA, "memory limit of the container", size(int(limit))))
    return found


def _gpu() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken torch is reported with the packages
        return Finding(AREA, "GPU", f"unknown: torch cannot be imported ({type(error).__name__})")
    if not torch.cuda.is_available():
        return Finding(AREA, "GPU", "none")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {properties.name}, {size(properties.total_memory)}")
    return Finding(AREA, "GPU", "; ".join(names))


def _compiler() -> Finding:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return Finding(AREA, "C++ compiler", path)
    return Finding(AREA, "C++ compiler", f"none ({named} of CXX is not found)" if named else "none")
