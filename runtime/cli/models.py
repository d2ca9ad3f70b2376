"""`eft models`: what can be served."""

from typing import Any

import msgspec
from rich.table import Table

from runtime.cli.flags import Json
from runtime.cli.output import console


def list_models(*, json: Json = False) -> None:
    """Print the architectures that can be served, and the plugin that brings one where it is not ours."""
    from runtime.workers.models import plugins, supported  # imports torch

    brought = plugins()
    found: list[dict[str, Any]] = [
        {"architecture": name, "plugin": brought[name].value if name in brought else None} for name in supported()
    ]
    if json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    table = Table("architecture", "plugin", box=None, pad_edge=False, header_style="bold")
    for item in found:
        table.add_row(item["architecture"], item["plugin"] or "–")
    console().print(table)
