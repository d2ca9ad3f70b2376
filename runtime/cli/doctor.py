"""`eft doctor`: findings about this machine, and problems. The checks of one area raise nothing."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from itertools import groupby
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.table import Table

from runtime.checkpoints.demo import DEMO_NAME, MEMBER, cache_directory
from runtime.cli.flags import Json
from runtime.cli.output import console
from runtime.support.machine import this_machine
from runtime.support.version import find_clash, version
from settings import fields, sources
from settings.load import SettingsError, load
from settings.schema import Settings


class Finding(Struct, frozen=True):
    """One fact. `problem`: the fault and its remedy; None if there is none."""

    area: str
    name: str
    value: str
    problem: str | None = None


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


def _problems(found: Iterable[Finding]) -> list[str]:
    return [finding.problem for finding in found if finding.problem]


def _print_json(found: list[Finding]) -> None:
    areas = {
        area: {item.name: {"value": item.value, "problem": item.problem} for item in items}
        for area, items in groupby(found, key=lambda item: item.area)
    }
    record = {"ok": not _problems(found), "problems": _problems(found), **areas}
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
        return Finding("software", name, "missing", f"{name} is not installed: pip install eft-server installs it")


def _torch() -> Finding:
    """Finding about torch: it is installed and works, and its number of threads."""
    try:
        import torch
    except Exception as error:
        reason = f"torch cannot be imported: {type(error).__name__}: {error}"
        return Finding("software", "threads", "unknown", reason)
    asked = os.environ.get("OMP_NUM_THREADS")
    return Finding(
        "software",
        "threads",
        f"{torch.get_num_threads()} (OMP_NUM_THREADS {f'is {asked}' if asked else 'not set'})",
    )


def _kernels() -> list[Finding]:
    """Findings about the backends of the ops: each works, or the reason why not. No problem while one works."""
    try:
        kernels = importlib.import_module("kernels")
        backends: dict[str, str | None] = kernels.available()
    except Exception as error:  # any error of an import there is reported
        reason = f"the kernels cannot be used: {type(error).__name__}: {error}"
        return [Finding("software", "kernels", "unusable", reason)]
    found = [Finding("software", f"kernels: {name}", reason or "works") for name, reason in backends.items()]
    if all(backends.values()):
        found.append(Finding("software", "kernels", "unusable", "no backend of the ops works here"))
    else:
        from runtime.model.model import make_device  # imports torch

        found.append(Finding("software", "kernels", kernels.chosen(make_device("auto"))))
    return found


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


def find_machine() -> list[Finding]:
    """Processor, memory, GPU and compiler."""
    machine = this_machine()
    memory = f"{size(machine.memory_available)} available of {size(machine.memory_total)}"
    found = [
        Finding("machine", "system", machine.system),
        Finding("machine", "processor", machine.processor or "unknown"),
        Finding("machine", "cores", f"{machine.cores} usable of {machine.all_cores}"),
        Finding("machine", "instruction sets", ", ".join(machine.instruction_sets) or "unknown"),
        Finding("machine", "memory", memory),
    ]
    if machine.memory_limit is not None:
        found.append(Finding("machine", "memory limit of the container", size(machine.memory_limit)))
    return [*found, _gpu(), _compiler()]


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
    return Finding("machine", "GPU", "; ".join(names) or "none")


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
        _directory("cache of Eft", cache_directory()),
        _demo(),
        *_hub(),
        _directory("working directory", Path.cwd()),
    ]


def _directory(name: str, path: Path) -> Finding:
    """Path of a directory and its free space. A missing one gets the free space of its parent."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        return Finding("storage", name, str(path), f"{name}: {path} cannot be made, as {there} is not a directory")
    try:
        room = f"{size(shutil.disk_usage(there).free)} free"
    except OSError as error:
        room = f"free space unknown: {error.strerror}"
    notes = [room] + ([] if os.access(there, os.W_OK) else ["not writable"])
    return Finding("storage", name, f"{path} ({', '.join(notes)})")


def _demo() -> Finding:
    path = cache_directory() / Path(MEMBER).name
    if not path.is_file():
        return Finding("storage", "demo model", f"not here yet; loading `demo` fetches {DEMO_NAME}")
    return Finding("storage", "demo model", f"{path.name}, {size(path.stat().st_size)}")


def _hub() -> Iterator[Finding]:
    try:
        from huggingface_hub import constants
    except ImportError:
        yield Finding("storage", "cache of the hub", "huggingface_hub is not installed")
        return
    cache = Path(constants.HF_HUB_CACHE)
    yield _directory("cache of the hub", cache)
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
        return Finding("plugins", name, value, f"{name} of {package} cannot be loaded: {type(error).__name__}: {error}")
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
        return Finding("settings", "settings", "not usable", "; ".join(error.problems))
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
