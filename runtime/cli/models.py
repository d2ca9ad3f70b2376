"""`eft models`: the architectures that can be served, and the model of a running server."""

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.client import DEFAULT_URL, AdminKey, Url, admin_client, ask
from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import CommandError, console


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


# -- swap ------------------------------------------------------------------------------------------
#
# `eft models swap`: move a running server to another model.

POLL_SECONDS = 0.5


def swap(
    model: Annotated[
        str | None,
        Parameter(help="NAME@VERSION of a job's, or the name that the server was started with; default: list them."),
    ] = None,
    /,
    *,
    mode: Annotated[
        Literal["auto", "beside", "drain"],
        Parameter(help="Load it beside the old model, or once that is gone; auto: beside where the memory allows it."),
    ] = "auto",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """Wait for the end of the move; exit code 1 where it failed, and the old model is served."""

    async def work() -> dict[str, Any]:
        async with admin_client(url, admin_key) as http:
            if model is not None:
                await ask(http, "POST", "/admin/model/swap", json={"model": model, "mode": mode})
            while True:
                found: dict[str, Any] = await ask(http, "GET", "/admin/model")
                if model is None or found["swap"]["finished_at"] is not None:
                    return found
                await asyncio.sleep(POLL_SECONDS)

    found = asyncio.run(work())
    done = None if model is None else found["swap"]
    if json:
        print(msgspec.json.format(msgspec.json.encode(done or found)).decode())
    elif done is None:
        for name in found["models"]:
            print(f"{name} (served as {found['name']})" if name == found["model"] else name)
    elif done["error"] is not None:
        raise CommandError(f"{done['error']['message']} The server answers with {found['model']}.")
    else:
        print(f"{found['name']} is {done['model']} now; it was {done['previous']}.")
        if done["unfit_adapters"]:
            print(f"Adapters for another base model, which are not served now: {', '.join(done['unfit_adapters'])}.")
        if done["aborted"]:
            print(f"{done['aborted']} sequences were not done within server.drain_timeout, and were ended.")
    return 0 if done is None or done["error"] is None else 1


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
