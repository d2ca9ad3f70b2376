"""Sources of settings: the TOML file and the environment, as (field, origin, raw value) triples.

Says what is unknown there, with the nearest known name. Converts nothing.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from settings import fields
from settings.fields import Field
from settings.suggest import hint, nearest

DEFAULT_FILE = Path("eft.toml")
"""Read from the working directory when neither a flag nor EFT_CONFIG names another."""

RESERVED = {
    "EFT_CONFIG": "The TOML file with the settings.",
    "EFT_CACHE_DIR": "Where downloaded models are kept.",
    "EFT_API_KEY": "The key that `eft chat`, `eft batch` and `eft bench serve` send to a server.",
    "EFT_ADMIN_KEY": "The key that `eft train`, `eft jobs` and `eft adapters` send to a server.",
    "EFT_CHAT_HISTORY": "The file that keeps what is typed into `eft chat`; empty: none does. Default: "
    "`eft-chat/history` under XDG_STATE_HOME or ~/.local/state.",
    "EFT_NO_PROGRESS": "Set to anything: no progress bars.",
    "EFT_FAILPOINTS": "Faults to inject, for tests.",
    "EFT_DEBUG": "1: errors of the command line come with a traceback.",
}
"""`EFT_…` variables that are no settings."""

# Kubernetes describes every service of the namespace in variables like these. A service named `eft`
# or `eft-server` must not be taken for settings (EFT_SERVER_PORT=tcp://10.0.0.1:8000).
_SERVICE_LINK = re.compile(r"EFT_(?:\w+_)?(?:SERVICE_(?:HOST|PORT)(?:_\w+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)\w*)")
_SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://")


class Given(Struct, frozen=True):
    """A value that someone gave for a setting."""

    field: Field
    origin: str
    """As `eft config show` prints it: "flag --port", "environment EFT_SERVER_PORT", "file eft.toml"."""
    raw: Any
    is_text: bool
    """From a flag or variable, so that numbers and booleans come as text."""


def locate(env: Mapping[str, str], file: Path | None) -> Path | None:
    """The file to read: `file`, else what EFT_CONFIG names, else ./eft.toml where there is one."""
    if file is not None:
        return file
    if named := env.get("EFT_CONFIG"):
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def read_file(path: Path, problems: list[str]) -> list[Given]:
    """Settings from the TOML file. Unreadable and unknown ones are added to `problems`."""
    origin = f"file {path}"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{origin}: there is no such file")
        return []
    except OSError as error:
        problems.append(f"{origin}: cannot be read: {error.strerror}")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"{origin}: is not UTF-8 (byte {error.start})")
        return []
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{origin}: is not valid TOML: {error}")
        return []
    given = []
    for section, table in tables.items():
        if section not in fields.sections():
            problems.append(f"{origin}: {_unknown_table(section, table)}")
        elif not isinstance(table, dict):
            problems.append(f"{origin}: {section} is a section: write [{section}] on a line of its own")
        else:
            given += _read_table(section, table, origin, problems)
    return given


def _read_table(section: str, table: dict[str, Any], origin: str, problems: list[str]) -> list[Given]:
    given = []
    for name, raw in table.items():
        if field := fields.by_key().get(f"{section}.{name}"):
            given.append(Given(field, origin, raw, is_text=False))
        else:
            problems.append(f"{origin}: unknown key {name!r} in [{section}]{_key_hint(name, section)}")
    return given


def _key_hint(name: str, section: str) -> str:
    """The same key in another section, else the nearest of this section, else of any."""
    siblings = [field.name for field in fields.fields() if field.section == section]
    exact = name if name in fields.by_name() else None
    match = exact or nearest(name, siblings) or nearest(name, fields.by_name())
    if match is None:
        return ""
    home = fields.by_name()[match].section
    return f"; did you mean {match}?" if home == section else f"; did you mean {match} in [{home}]?"


def _unknown_table(name: str, table: object) -> str:
    if isinstance(table, dict):
        return f"unknown section [{name}]{hint(name, fields.sections())}"
    return f"unknown key {name!r} outside of a section{_key_hint(name, '')}"


def read_env(env: Mapping[str, str], problems: list[str]) -> list[Given]:
    """Settings from the environment. An empty variable counts as not set."""
    given = []
    for variable, text in sorted(env.items()):
        if not variable.startswith("EFT_") or variable in RESERVED or is_service_link(variable, text):
            continue
        if field := fields.by_env().get(variable):
            if text:
                given.append(Given(field, f"environment {variable}", text, is_text=True))
            elif field.secret:  # `EFT_SERVER_API_KEY=$UNSET` must not open the server to everyone
                problems.append(f"environment {variable}: is empty; give it a value or unset it")
        elif message := _unknown_variable(variable):
            problems.append(f"environment {variable}: {message}")
    return given


def is_service_link(variable: str, text: str) -> bool:
    """True if Kubernetes set this variable to describe a service."""
    return bool(_SERVICE_LINK.fullmatch(variable) or _SERVICE_URL.match(text))


def _unknown_variable(variable: str) -> str:
    """Complaint about an unknown variable; nothing where it is like no setting, and so may be another program's."""
    section = next((name for name in fields.sections() if variable.startswith(f"EFT_{name.upper()}_")), None)
    match = _near_variable(variable, 0.6 if section else 0.85)
    if section is None:
        return f"unknown variable; did you mean {match}?" if match else ""
    return f"unknown setting of section {section}" + (f"; did you mean {match}?" if match else "")


def _near_variable(variable: str, cutoff: float) -> str | None:
    known = {name.lower(): name for name in [*fields.by_env(), *RESERVED]}
    match = nearest(variable, known, cutoff=cutoff)
    return known[match] if match else None
