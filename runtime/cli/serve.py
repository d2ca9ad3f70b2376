"""`eft serve`: the server, until it is told to stop."""

import asyncio
import gc
import os
from typing import Annotated, Any

from cyclopts import Parameter

from runtime.cli.banner import banner
from runtime.cli.client import remote, served_model
from runtime.cli.errors import CommandError
from runtime.cli.flags import Config, read_settings, with_settings
from settings.schema import Settings


@with_settings()
def serve(
    model: Annotated[
        str | None,
        Parameter(help="A model directory, a GGUF file, a hub id, or `demo`; default: the setting model.model."),
    ] = None,
    *,
    config: Config = None,
    **flags: Any,
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the server's exit code."""
    settings = read_settings(flags, config, model=model).settings
    from runtime.clash import refuse_clash
    from runtime.workers.memory import share_one_arena

    refuse_clash()
    share_one_arena()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's processes, of which only the first is the server
        from runtime.ranks.torchrun import follow_torchrun

        follow_torchrun(settings.parallel)
    import uvloop

    from runtime import logs

    logs.configure(settings.observability)
    code: int = uvloop.run(_serve(settings))
    return code


async def _serve(settings: Settings) -> int:
    from runtime.api.server import serve as run_server

    greetings: list[asyncio.Task[None]] = []  # a task that nobody holds may be collected

    def ready(url: str) -> None:
        gc.collect()
        gc.freeze()
        gc.enable()
        greetings.append(asyncio.create_task(_greet(url, settings)))

    # What is there once it serves, a few hundred thousand objects, stays: no collection needs to go through it, neither
    # while it comes into being nor later, which would stop every stream for a tenth of a second, nor at the end.
    gc.disable()
    try:
        return await run_server(settings, on_ready=ready)
    finally:
        gc.enable()


async def _greet(url: str, settings: Settings) -> None:
    """Ask the server what its model is called, as a client would, and print how to try it."""
    keys = settings.server.api_key
    try:
        async with remote(url, keys[0] if keys else None) as client:
            name = await served_model(client)
    except CommandError:  # stopped this very moment, or a proxy in between: what we asked for will do
        name = settings.model.served_model_name or settings.model.model
    print(banner(url, name, needs_key=bool(keys)), flush=True)
