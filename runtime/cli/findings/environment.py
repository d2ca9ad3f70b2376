"""The settings and the environment variables, without what is secret in them."""

import os
import re

from runtime.cli.findings import Finding
from settings import fields, sources
from settings.load import SettingsError, load

AREA = "settings"

_RELEVANT = re.compile(r"(EFT|HF|HUGGING_FACE|CUDA|OMP|KMP|MKL|TORCH|TRITON)_|CXX$|LD_PRELOAD$|https?_proxy$", re.I)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def find() -> list[Finding]:
    return [_file(), _settings(), *_variables()]


def _file() -> Finding:
    path = sources.locate(os.environ, None)
    return Finding(AREA, "file", str(path.absolute()) if path else f"none (no ./{sources.DEFAULT_FILE})")


def _settings() -> Finding:
    try:
        origins = load().origins
    except SettingsError as error:
        return Finding(AREA, "settings", "not usable", "; ".join(error.problems))
    changed = [key for key, origin in origins.items() if origin != "default"]
    return Finding(AREA, "settings", f"changed: {', '.join(changed)}" if changed else "all at their defaults")


def _variables() -> list[Finding]:
    return [
        Finding(AREA, name, _shown(name, value)) for name, value in sorted(os.environ.items()) if _RELEVANT.match(name)
    ]


def _shown(name: str, value: str) -> str:
    field = fields.by_env().get(name)
    if (field and field.secret) or _SECRET.search(name):
        return "set (hidden)" if value else "empty"
    return _LOGIN_IN_URL.sub("(hidden)@", value)
