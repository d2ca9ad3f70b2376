"""`eft config`: the settings, their sources, and files to start from."""

import os
from typing import Any

import msgspec
from rich.table import Table

from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import CommandError, console
from settings import fields, render, sources, values
from settings.load import Loaded


@with_settings()
def show(*, json: Json = False, config: ConfigFile = None, **flags: Any) -> None:
    """Print each setting, its value and where it came from. Keys and tokens are hidden."""
    loaded = read_settings(flags, config)
    if json:
        print(msgspec.json.format(msgspec.json.encode(_as_dict(loaded))).decode())
        return
    table = Table("setting", "value", "from", box=None, pad_edge=False, header_style="bold")
    for field in fields.fields():
        origin = loaded.origins[field.key]
        style = "dim" if origin == "default" else None
        table.add_row(field.key, values.show(field, _value(loaded, field)) or "–", origin, style=style)
    console().print(table)


def example() -> None:
    """Print a settings file with every key, commented out."""
    print(render.example_toml(), end="")


def docs() -> None:
    """Print the reference page of all settings, in Markdown."""
    print(render.reference(), end="")


def api() -> None:
    """Print the reference page of the fields of requests, in Markdown."""
    from runtime.api.reference import reference_page

    print(reference_page(), end="")


def cli() -> None:
    """Print the reference page of the commands, in Markdown."""
    from runtime.cli.app import app
    from runtime.cli.reference import command_page

    print(command_page(app), end="")


def metrics() -> None:
    """Print the reference page of the metrics, in Markdown."""
    from runtime.cli.reference import metrics_page

    print(metrics_page(), end="")


def path(*, config: ConfigFile = None) -> None:
    """Print the path of the settings file that would be read; exit 1 when there is none."""
    found = sources.locate(os.environ, config)
    if found is None:
        raise CommandError(
            f"no settings file: neither --config nor EFT_CONFIG names one, and there is no ./{sources.DEFAULT_FILE}"
        )
    print(found.absolute())


def _as_dict(loaded: Loaded) -> dict[str, Any]:
    tree: dict[str, Any] = {section: {} for section in fields.sections()}
    for field in fields.fields():
        value = _value(loaded, field)
        tree[field.section][field.name] = {
            "value": values.show(field, value) or None if field.secret else value,
            "origin": loaded.origins[field.key],
        }
    return {"file": str(loaded.file.absolute()) if loaded.file else None, "settings": tree}


def _value(loaded: Loaded, field: fields.Field) -> Any:
    return getattr(getattr(loaded.settings, field.section), field.name)
