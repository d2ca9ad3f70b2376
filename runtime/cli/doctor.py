"""`eft doctor`: findings about this machine, problems, and advice. The checks of one area raise nothing.

`eft kernels build` is here too, which some of the advice names.
"""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from itertools import groupby
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from msgspec import Struct
from rich.table import Table

from runtime.checkpoints.demo import DEMO_NAME, MEMBER, cache_directory
from runtime.cli.flags import Json
from runtime.cli.output import console
from runtime.support.machine import this_machine
from runtime.support.state_directory import state_directory
from runtime.support.version import find_clash, version
from settings import fields, sources
from settings.load import SettingsError, load
from settings.schema import Settings


class Finding(Struct, frozen=True):
    """One fact. `problem`: the fault and its remedy; None if there is none. `advice`: what would be better, and how."""

    area: str
    name: str
    value: str
    problem: str | None = None
    advice: str | None = None


def size(number: float) -> str:
    """A number of bytes in readable form: `3.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def doctor(*, json: Json = False) -> int:
    """Report machine, software, kernels, model cache, plugins and settings. Exit code 1 when something is broken."""
    areas = (find_software, find_flash_attention, find_machine, find_storage, find_plugins, find_environment)
    found = [finding for find in areas for finding in find()]
    if json:
        _print_json(found)
    else:
        _print_text(found)
    return 1 if _problems(found) else 0


def build_kernels(
    *,
    every: Annotated[
        bool, Parameter(name="--all", help="For all processors of this architecture.", negative="", show_default=False)
    ] = False,
) -> int:
    """Compile the C++ kernels; those of another processor too if `every`."""
    build = importlib.import_module("kernels.build")
    variants = importlib.import_module("kernels.cpu.variants")
    code: int = build.main(None if every else variants.wanted_variants()[:1])
    return code


def _problems(found: Iterable[Finding]) -> list[str]:
    return [finding.problem for finding in found if finding.problem]


def _advice(found: Iterable[Finding]) -> list[str]:
    return [finding.advice for finding in found if finding.advice]


def _print_json(found: list[Finding]) -> None:
    areas = {
        area: {item.name: {"value": item.value, "problem": item.problem, "advice": item.advice} for item in items}
        for area, items in groupby(found, key=lambda item: item.area)
    }
    record = {"ok": not _problems(found), "problems": _problems(found), "advice": _advice(found), **areas}
    print(msgspec.json.format(msgspec.json.encode(record)).decode())


def _print_text(found: list[Finding]) -> None:
    out = console()
    for area, items in groupby(found, key=lambda item: item.area):
        out.print(area, style="bold")
        table = Table(box=None, show_header=False, pad_edge=False)
        for item in items:
            table.add_row(f"  {item.name}", item.value, style="red" if item.problem else None)
        out.print(table)
    problems = _problems(found)
    out.print("Nothing is broken." if not problems else "Broken:", style="bold")
    for problem in problems:
        out.print(f"  {problem}", style="red")
    advice = _advice(found)
    if advice:
        out.print("Could be better:", style="bold")
    for line in advice:
        out.print(f"  {line}")


# -- software --------------------------------------------------------------------------------------
#
# The software: versions, a clash of packages, threads, and which kernels work here.

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "msgspec", "litestar", "uvicorn", "uvloop",
    "httpx", "jinja2", "structlog", "prometheus-client", "psutil",
)  # fmt: skip


def find_software() -> list[Finding]:
    """Versions, a clash of packages, threads, and kernels."""
    return [
        Finding("software", "eft", version()),
        Finding("software", "Python", platform.python_version()),
        *[_package(name) for name in _PACKAGES],
        _torch(),
        Finding("software", "clash of packages", "none" if not (clash := find_clash()) else "found", clash),
        *_kernels(),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding("software", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "software", name, "missing", f"{name} is not installed: pip install {name}, or install Eft again"
        )


def _torch() -> Finding:
    """Finding about torch: it is installed and works, and its number of threads."""
    try:
        import torch
    except Exception as error:
        reason = (
            f"torch cannot be imported: {type(error).__name__}: {error}; install it again, in a build for this machine"
        )
        return Finding("software", "threads", "unknown", reason)
    asked, threads, cores = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), this_machine().cores
    return Finding(
        "software",
        "threads",
        f"{threads} (OMP_NUM_THREADS {f'is {asked}' if asked else 'not set'})",
        advice=f"{threads} of {cores} cores are used: unset OMP_NUM_THREADS" if asked and threads < cores else None,
    )


def _kernels() -> list[Finding]:
    """Findings about the backends of the ops: each works, or the reason why not. No problem while one works."""
    try:
        kernels = importlib.import_module("kernels")
        backends: dict[str, str | None] = kernels.available()
    except Exception as error:  # any error of an import there is reported
        reason = f"the kernels cannot be used: {type(error).__name__}: {error}; install Eft again"
        return [Finding("software", "kernels", "unusable", reason)]
    found = [
        Finding("software", f"kernels: {name}", reason or "works", advice=_kernels_advice(name, reason))
        for name, reason in backends.items()
    ]
    if all(backends.values()):
        found.append(Finding("software", "kernels", "unusable", "no backend of the ops works here: install Eft again"))
    else:
        from runtime.model.model import make_device  # imports torch

        found.append(Finding("software", "kernels", kernels.chosen(make_device("auto"))))
    return found


def _kernels_advice(name: str, reason: str | None) -> str | None:
    """The way to a backend that is worth having on this machine and cannot be used."""
    if reason is None:
        return None
    if name == "cpu":
        return (
            f"The slower ops of torch serve on the CPU ({reason}): install a C++ compiler (Debian: apt-get install "
            "g++), then run eft kernels build"
        )
    if name == "triton" and os.path.exists(NVIDIA_DRIVER):
        return f"The GPU's own kernels are not used: {reason}"
    return None


# -- flash attention -------------------------------------------------------------------------------
#
# Use of flash-attn: with some settings it can read the KV cache, with others not.


def find_flash_attention() -> list[Finding]:
    """Use of flash-attn, or the reason against it."""
    try:
        flash = importlib.import_module("kernels.triton.flash")
        reason: str | None = flash.unavailable()
        block: int = flash.BLOCK
    except Exception as error:  # then there are no kernels, which another finding reports
        return [Finding("software", "flash-attn", f"not used: {type(error).__name__}: {error}")]
    if reason is not None:
        return [Finding("software", "flash-attn", f"not used: {reason}")]
    try:
        settings = load().settings
    except SettingsError:  # another finding names these
        settings = Settings()
    if (obstacle := cache_obstacle(settings, block)) is not None:
        return [Finding("software", "flash-attn", f"used in training; prompts are left to Triton, as {obstacle}")]
    return [Finding("software", "flash-attn", "used for prompts and in training")]


def cache_obstacle(settings: Settings, block: int) -> str | None:
    """Reason why flash-attn, with blocks of `block` tokens, cannot read the cache of these settings; None if it can."""
    cache = settings.cache
    if cache.block_size % block:
        return f"cache.block_size is {cache.block_size}, and it reads multiples of {block}"
    stored = settings.model.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    if stored in ("float32", "int8"):
        return f"the cache holds {stored}, and it reads bfloat16"
    return None


# -- machine ---------------------------------------------------------------------------------------
#
# The machine: processor, memory, GPU, compiler.


LITTLE_MEMORY = 2 << 30
"""Bytes of free memory below which not even a small model is comfortable beside its KV cache."""
LITTLE_ROOM = 2 << 30
"""Bytes of free disk below which checkpoints and models soon find none."""
FEW_DESCRIPTORS = 4096
NVIDIA_DRIVER = "/dev/nvidiactl"
"""There where the driver of an NVIDIA GPU is loaded."""


def find_machine() -> list[Finding]:
    """Processor, memory, GPU and compiler."""
    machine = this_machine()
    memory = f"{size(machine.memory_available)} available of {size(machine.memory_total)}"
    found = [
        Finding("machine", "system", machine.system),
        Finding("machine", "processor", machine.processor or "unknown"),
        Finding("machine", "cores", f"{machine.cores} usable of {machine.all_cores}"),
        Finding("machine", "instruction sets", ", ".join(machine.instruction_sets) or "unknown"),
        Finding("machine", "memory", memory, advice=_memory_advice(machine.memory_available)),
        _descriptors(),
    ]
    if machine.memory_limit is not None:
        found.append(Finding("machine", "memory limit of the container", size(machine.memory_limit)))
    return [*found, _gpu(), _compiler()]


def _memory_advice(available: float) -> str | None:
    if available >= LITTLE_MEMORY:
        return None
    return (
        f"Only {size(available)} of memory are free: serve with --quantization int8 or int4, a smaller --kv-memory, or "
        "a smaller model"
    )


def _descriptors() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding("machine", "file descriptors", "unlimited")
    advice = (
        f"A connection takes a file descriptor, and there are {hard}: raise the hard limit (ulimit -Hn, systemd's "
        "LimitNOFILE, docker's --ulimit nofile)"
    )
    return Finding("machine", "file descriptors", f"up to {hard}", advice=advice if hard < FEW_DESCRIPTORS else None)


def _gpu() -> Finding:
    try:
        importlib.import_module("torch")
    except Exception as error:  # a broken torch is reported with the packages
        return Finding("machine", "GPU", f"unknown: torch cannot be imported ({type(error).__name__})")
    try:
        found = importlib.import_module("runtime.model.model").gpus()
    except Exception as error:  # it imports the kernels, whose errors another finding reports
        return Finding("machine", "GPU", f"unknown: {type(error).__name__}: {error}")
    names = [f"cuda:{index} {gpu.name}, {size(gpu.memory)}" for index, gpu in enumerate(found)]
    advice = None
    if not names and os.path.exists(NVIDIA_DRIVER):
        advice = (
            "There is a driver for an NVIDIA GPU, and torch finds none: install a build of torch for CUDA, and look at "
            "CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
    return Finding("machine", "GPU", "; ".join(names) or "none", advice=advice)


def _compiler() -> Finding:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return Finding("machine", "C++ compiler", path)
    return Finding("machine", "C++ compiler", f"none ({named} of CXX is not found)" if named else "none")


# -- storage ---------------------------------------------------------------------------------------
#
# Disks and the content of the model caches.

_HUB_PREFIX = "models--"


def find_storage() -> list[Finding]:
    """Disks, and the content of the model caches."""
    return [
        _directory("cache of Eft", cache_directory(), "EFT_CACHE_DIR"),
        _demo(),
        *_hub(),
        *_state(),
        _directory("working directory", Path.cwd(), written=False),
    ]


def _state() -> Iterator[Finding]:
    """The state directory of the settings; other findings name settings that cannot be used."""
    with contextlib.suppress(SettingsError):
        yield _directory("state directory", state_directory(load().settings), "EFT_TRAINER_STATE_DIR")


def _directory(name: str, path: Path, variable: str = "", *, written: bool = True) -> Finding:
    """Path of a directory and its free space. A missing one gets the free space of its parent. `variable` names another
    place; `written`: Eft keeps things there."""
    elsewhere = f"; {variable} names another place" if variable else ""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        problem = f"{name}: {path} cannot be made, as {there} is not a directory{elsewhere}"
        return Finding("storage", name, str(path), problem)
    advice = None
    try:
        free = shutil.disk_usage(there).free
        room = f"{size(free)} free"
        if written and free < LITTLE_ROOM:
            advice = f"{name}: only {size(free)} are free at {there}: make room (eft state du){elsewhere}"
    except OSError as error:
        room = f"free space unknown: {error.strerror}"
    notes = [room]
    if not os.access(there, os.W_OK):
        notes.append("not writable")
        advice = f"{name}: {there} is not writable for this user{elsewhere}" if written else None
    return Finding("storage", name, f"{path} ({', '.join(notes)})", advice=advice)


def _demo() -> Finding:
    path = cache_directory() / Path(MEMBER).name
    if not path.is_file():
        return Finding("storage", "demo model", f"not here yet; loading `demo` fetches {DEMO_NAME}")
    return Finding("storage", "demo model", f"{path.name}, {size(path.stat().st_size)}")


def _hub() -> Iterator[Finding]:
    try:
        from huggingface_hub import constants
    except ImportError:
        yield Finding(
            "storage", "cache of the hub", "huggingface_hub is not installed (for hub ids: pip install huggingface-hub)"
        )
        return
    cache = Path(constants.HF_HUB_CACHE)
    yield _directory("cache of the hub", cache, "HF_HOME")
    if not cache.is_dir():
        return
    for model in sorted(cache.glob(f"{_HUB_PREFIX}*")):
        name = model.name.removeprefix(_HUB_PREFIX).replace("--", "/", 1)
        yield Finding("storage", f"hub model {name}", size(_bytes_in(model / "blobs")))


def _bytes_in(directory: Path) -> int:
    """Total bytes of the files in `directory`, a hub model's blobs; its snapshots are links to these."""
    total = 0
    for entry in directory.glob("*"):
        try:
            total += entry.stat().st_size
        except OSError:  # deleted meanwhile, or a link to nowhere
            continue
    return total


# -- plugins ---------------------------------------------------------------------------------------
#
# Plugins from other packages: models and hooks.

GROUPS = ("eft.models", "eft.hooks")
"""Entry points; each has its own page in the documentation."""


def find_plugins() -> list[Finding]:
    """Plugins of other packages; one that cannot be loaded is a problem."""
    return [finding for group in GROUPS for finding in _group_of_plugins(group)]


def _group_of_plugins(group: str) -> list[Finding]:
    found = sorted(entry_points(group=group), key=lambda entry: entry.name)
    return [_plugin(group, entry) for entry in found] or [Finding("plugins", group, "none")]


def _plugin(group: str, entry: EntryPoint) -> Finding:
    """Finding about the import of a plugin: without it a server does not start, or does not serve that model."""
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
    name, value = f"{group}: {entry.name}", f"{entry.value} of {package}"
    try:
        entry.load()
    except Exception as error:  # any error of its import is reported
        problem = (
            f"{name} of {package} cannot be loaded: {type(error).__name__}: {error}; install it again, or uninstall it"
        )
        return Finding("plugins", name, value, problem)
    return Finding("plugins", name, value)


# -- environment -----------------------------------------------------------------------------------
#
# The settings and the environment variables, without secrets.

_RELEVANT = re.compile(r"(EFT|HF|HUGGING_FACE|CUDA|OMP|KMP|MKL|TORCH|TRITON)_|CXX$|LD_PRELOAD$|https?_proxy$", re.I)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def find_environment() -> list[Finding]:
    """Settings and environment variables, without secrets."""
    return [_settings_file(), _settings(), *_variables()]


def _settings_file() -> Finding:
    path = sources.locate(os.environ, None)
    return Finding("settings", "file", str(path.absolute()) if path else f"none (no ./{sources.DEFAULT_FILE})")


def _settings() -> Finding:
    try:
        origins = load().origins
    except SettingsError as error:
        return Finding(
            "settings", "settings", "not usable", "; ".join((*error.problems, "eft config example has every key"))
        )
    changed = [key for key, origin in origins.items() if origin != "default"]
    return Finding("settings", "settings", f"changed: {', '.join(changed)}" if changed else "all at their defaults")


def _variables() -> list[Finding]:
    return [
        Finding("settings", name, _shown(name, value))
        for name, value in sorted(os.environ.items())
        if _RELEVANT.match(name)
    ]


def _shown(name: str, value: str) -> str:
    field = fields.by_env().get(name)
    if (field and field.secret) or _SECRET.search(name):
        return "set (hidden)" if value else "empty"
    return _LOGIN_IN_URL.sub("(hidden)@", value)
