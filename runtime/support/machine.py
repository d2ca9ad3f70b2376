"""The machine that this process runs on: processor, cores, memory."""

import os
import platform
from pathlib import Path

import psutil
from msgspec import Struct

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


class Machine(Struct, frozen=True, kw_only=True):
    """Facts about a machine. Sizes are in bytes."""

    system: str
    """Operating system, its version, architecture."""
    processor: str | None
    cores: int
    """Cores that this process may use."""
    all_cores: int
    instruction_sets: list[str]
    """Those that kernels are chosen by, in order of introduction."""
    memory_total: int
    memory_available: int
    memory_limit: int | None
    """Limit of the container; null without one."""


class Gpu(Struct, frozen=True, kw_only=True):
    """One GPU."""

    name: str
    memory: int
    """Bytes."""


class GpuUsage(Struct, frozen=True, kw_only=True):
    """One GPU now: by all processes, those of others included."""

    index: int
    """Number by which this process knows it."""
    used: int
    """Bytes."""
    total: int
    busy: float | None
    """Share of the last sampling period in which a kernel ran, 0 to 1; None where the driver does not say."""


def this_machine() -> Machine:
    """The facts now. Reads files of the system."""
    try:
        info = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a system without such a file
        info = ""
    processor, instruction_sets = parse_cpuinfo(info)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor or platform.processor() or None,
        cores=usable or 1,
        all_cores=os.cpu_count() or 1,
        instruction_sets=instruction_sets,
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=_container_limit(),
    )


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model and instruction sets of the first processor in /proc/cpuinfo, of x86 or ARM. Of the sets,
    only those by which kernels here or in torch are chosen, in order of introduction."""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    info = {name.strip(): value.strip() for name, _, value in pairs}
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return info.get("model name"), [name for name in _INSTRUCTION_SETS if name in flags]


def _container_limit() -> int | None:
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None
