"""`eft chat`: talk to a server, or to a model loaded here."""

import asyncio
import sys
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Any

import httpx
from cyclopts import Parameter

from runtime.cli import client
from runtime.cli.conversation import Conversation
from runtime.cli.errors import CommandError, UsageError
from runtime.cli.flags import MODEL_SECTIONS, Config, read_settings, refuse_settings, with_settings
from runtime.cli.repl import HELP, Repl

DEFAULT_URL = "http://127.0.0.1:8000"


@with_settings(*MODEL_SECTIONS)
def chat(
    model: Annotated[
        str | None,
        Parameter(help="What to load here, such as `demo`; with --url: the name of a model of that server."),
    ] = None,
    *,
    url: Annotated[
        str | None, Parameter(help=f"Server to talk to; default: {DEFAULT_URL} if one answers there.")
    ] = None,
    api_key: Annotated[str | None, Parameter(help="Key for the server; default: EFT_API_KEY.")] = None,
    system: Annotated[str | None, Parameter(help="System message.")] = None,
    temperature: Annotated[float | None, Parameter(help="0 is greedy; default: the server's.")] = None,
    max_tokens: Annotated[int | None, Parameter(help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, Parameter(help="Same seed, same answers.")] = None,
    json: Annotated[bool, Parameter(help="One JSON object per answer.", negative="", show_default=False)] = False,
    config: Config = None,
    **flags: Any,
) -> int:
    """Answer questions until the input ends. Returns 1 where one that was piped in failed."""
    if model and not url:
        if api_key is not None:
            raise UsageError("--api-key is for a server; a model that is loaded here asks for none")
        loaded = read_settings(flags, config, model=model)
    else:
        refuse_settings(flags, config)
        loaded = None
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    params = {name: value for name, value in sampling.items() if value is not None}
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not json
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            opened = client.in_process(loaded) if loaded else client.remote(url or DEFAULT_URL, api_key)
            http = runner.run(stack.enter_async_context(opened))
            name = runner.run(_model_name(http, url, model))
            conversation = Conversation(http, name, system=system, params=params)
            if interactive:
                _prepare_terminal(name)
            return Repl(conversation, runner.run, interactive=interactive, json=json).loop()
        finally:
            runner.run(stack.aclose())


async def _model_name(http: httpx.AsyncClient, url: str | None, model: str | None) -> str:
    if url and model:
        return model
    try:
        return await client.served_model(http)
    except CommandError as error:
        if url or model:
            raise
        raise CommandError(f"{error}. Give --url, or a model to load here: eft chat demo") from error


def _prepare_terminal(name: str) -> None:
    with suppress(ImportError):  # line editing where Python was built with it
        import readline  # noqa: F401
    print(f"{name}\n{HELP}")
