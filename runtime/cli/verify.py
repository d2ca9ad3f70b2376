"""`eft models verify`: a checkpoint looked at, and compared with transformers."""

from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.flags import Config, Json, read_settings, with_settings
from runtime.cli.output import console


@with_settings("model")
def verify(
    model: Annotated[str | None, Parameter(help="As for `eft serve`; default: that of the settings.")] = None,
    *,
    json: Json = False,
    config: Config = None,
    **flags: Any,
) -> int:
    """Print what was looked at; exit code 1 when something is wrong."""
    from runtime import logs, verification

    settings = read_settings(flags, config, model=model).settings
    logs.configure(settings.observability)  # to stderr: what is printed is the report
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
