"""`eft models`: the architectures that can be served."""

from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import console


def list_models(*, json: Json = False) -> None:
    """Print the architectures that can be served, and the plugin that brings one where it is not ours."""
    from runtime.model.families import plugins, supported  # imports torch

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


# -- verify ----------------------------------------------------------------------------------------
#
# `eft models verify`: check a checkpoint, and compare it with transformers.


@with_settings("model")
def verify(
    model: Annotated[str | None, Parameter(help="As for `eft serve`; default: that of the settings.")] = None,
    *,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Print what was looked at; exit code 1 when something is wrong."""
    from runtime.checkpoints import verification
    from runtime.support import logs

    settings = read_settings(flags, config, model=model).settings
    logs.configure(settings.observability)  # to stderr: stdout is for the report
    report = verification.verify(settings.model)
    if json:
        record = {"ok": report.ok, **msgspec.to_builtins(report)}
        print(msgspec.json.format(msgspec.json.encode(record)).decode())
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in report.checks:
            table.add_row(check.name, check.found, style=None if check.ok else "red")
        console().print(table)
        console().print("Nothing is wrong." if report.ok else "Something is wrong.", style="bold")
    return 0 if report.ok else 1
