"""The version of Eft: from the installed distribution, else from the source tree's pyproject.toml."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import tomllib
from pathlib import Path


@functools.cache
def version() -> str:
    """Version of Eft: the installed package's, or the source tree's."""
    try:
        return importlib.metadata.version("eft-server")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


_PACKAGES = ("torch", "tokenizers", "transformers", "peft", "safetensors")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Eft, Python, and the packages that decide about the results of training."""
    found = {"eft": version(), "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- clash -----------------------------------------------------------------------------------------
#
# Refusal to run beside another package that is imported as `kernels`.
#
# Hugging Face has a distribution of that name, with an import package of that name. The first of the two on the path
# hides the other, and the errors that follow do not name the cause.

_OURS = Path(__file__).resolve().parents[2] / "kernels"


class PackageClash(Exception):
    """Another distribution claims an import package of ours."""


def find_clash() -> str | None:
    """The problem and its remedy, or None when `import kernels` can only mean ours."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is not None:
        return (
            f"Hugging Face's `kernels` {version} is installed in this environment. Eft has a package that is "
            "imported by the same name, so one would hide the other. Uninstall it (pip uninstall kernels), "
            "or install Eft in a virtual environment of its own."
        )
    spec = importlib.util.find_spec("kernels")
    locations = spec.submodule_search_locations if spec else None
    places = [Path(place).resolve() for place in locations or ()]
    if _OURS not in places:
        found = f"finds {places[0]}" if places else "finds nothing"
        return (
            f"`import kernels` {found} instead of Eft's own package. Take that directory off PYTHONPATH, or "
            "install Eft in a virtual environment of its own."
        )
    return None


def refuse_clash() -> None:
    """Raise `PackageClash` where `find_clash` finds one. Called before anything loads a model."""
    if message := find_clash():
        raise PackageClash(message)
