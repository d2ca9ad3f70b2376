"""The software: versions, a clash of packages, threads, and which kernels work here."""

import importlib
import importlib.metadata
import os
import platform

from runtime.clash import find_clash
from runtime.cli.findings import Finding
from runtime.version import version

AREA = "software"

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "gguf", "msgspec", "litestar", "uvicorn", "uvloop",
    "httpx", "jinja2", "structlog", "prometheus-client", "psutil",
)  # fmt: skip


def find() -> list[Finding]:
    return [
        Finding(AREA, "eft", version()),
        Finding(AREA, "Python", platform.python_version()),
        *[_package(name) for name in _PACKAGES],
        _torch(),
        Finding(AREA, "clash of packages", "none" if not (clash := find_clash()) else "found", clash),
        *_kernels(),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding(AREA, name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(AREA, name, "missing", f"{name} is not installed: pip install eft-server installs it")


def _torch() -> Finding:
    """Whether torch not only lies there but works, and with how many threads."""
    try:
        import torch
    except Exception as error:
        reason = f"torch cannot be imported: {type(error).__name__}: {error}"
        return Finding(AREA, "threads", "unknown", reason)
    asked = os.environ.get("OMP_NUM_THREADS")
    return Finding(
        AREA,
        "threads",
        f"{torch.get_num_threads()} (OMP_NUM_THREADS {f'is {asked}' if asked else 'not set'})",
    )


def _kernels() -> list[Finding]:
    """Each backend of the ops: it works, or why not. That is no problem while one works."""
    try:
        kernels = importlib.import_module("kernels")
        backends: dict[str, str | None] = kernels.available()
    except Exception as error:  # whatever breaks an import there is what is to be reported
        reason = f"the kernels cannot be used: {type(error).__name__}: {error}"
        return [Finding(AREA, "kernels", "unusable", reason)]
    found = [Finding(AREA, f"kernels: {name}", reason or "works") for name, reason in backends.items()]
    if all(backends.values()):
        found.append(Finding(AREA, "kernels", "unusable", "no backend of the ops works here"))
    else:
        from runtime.workers.device import make_device  # imports torch

        found.append(Finding(AREA, "kernels", kernels.chosen(make_device("auto"))))
    return found
