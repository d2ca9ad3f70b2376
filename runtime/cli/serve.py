"""`eft serve`: the server, until it is told to stop."""

from typing import Annotated, Any

from cyclopts import Parameter

from runtime.cli.flags import Config, read_settings, with_settings


@with_settings()
def serve(
    model: Annotated[
        str | None,
        Parameter(
            help="A model directory, a GGUF file, a hub id, or `demo`; default: the setting model.model."
        ),
    ] = None,
    *,
    config: Config = None,
    **flags: Any,
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the server's exit code."""
    settings = read_settings(flags, config, model=model).settings
    from runtime.clash import refuse_clash

    refuse_clash()
    import uvloop

    from runtime.api.server import serve as run_server
    from runtime.cli.banner import banner

    def ready(url: str) -> None:
        name = settings.model.served_model_name or settings.model.model
        print(banner(url, name, needs_key=bool(settings.server.api_key)), flush=True)

    code: int = uvloop.run(run_server(settings, on_ready=ready))
    return code
