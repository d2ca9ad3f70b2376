"""`eft serve`: run the server until a signal stops it."""

import gc
import os
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from runtime.cli.flags import ConfigFile, read_settings, with_settings
from settings.load import Loaded
from settings.schema import Settings

# -- banner ----------------------------------------------------------------------------------------
#
# Banner that `eft serve` prints when it is ready: its URL, and two snippets to try.

_QUESTION = "Why is the sky blue?"
_MAX_TOKENS = 100


def banner(url: str, model: str, *, needs_key: bool, page: bool = True) -> str:
    """Text of the banner. `needs_key`: the snippets read the key from EFT_API_KEY; the key itself is never printed.
    `page`: there is a page at /."""
    visit = f"Open {url}/ in a browser, or try" if page else "Try"
    return (
        f"Serving {model} at {url} (Ctrl-C stops it). {visit}:\n\n"
        f"{_curl(url, model, needs_key)}\n\n"
        f"or, after `pip install openai`:\n\n{_python(url, model, needs_key)}\n"
    )


def _curl(url: str, model: str, needs_key: bool) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": _MAX_TOKENS}
    lines = [f"curl {url}/v1/chat/completions", "-H 'Content-Type: application/json'"]
    if needs_key:
        lines.append('-H "Authorization: Bearer $EFT_API_KEY"')
    lines.append(f"-d {shlex.quote(msgspec.json.encode(body).decode())}")
    return " \\\n  ".join(lines)


def _python(url: str, model: str, needs_key: bool) -> str:
    key = 'os.environ["EFT_API_KEY"]' if needs_key else '"none"'
    return "\n".join(
        [
            *(["import os", ""] if needs_key else []),
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{url}/v1", api_key={key})',
            "stream = client.chat.completions.create(",
            f"    model={msgspec.json.encode(model).decode()},",
            f'    messages=[{{"role": "user", "content": "{_QUESTION}"}}],',
            f"    max_tokens={_MAX_TOKENS},",
            "    stream=True,",
            ")",
            "for chunk in stream:",
            '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
        ]
    )


@with_settings()
def serve(
    model: Annotated[
        str | None,
        Parameter(help="A model directory, a GGUF file, a hub id, or `demo`; default: the setting model.model."),
    ] = None,
    *,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the server's exit code."""
    loaded = read_settings(flags, config, model=model)
    settings = loaded.settings
    from runtime.support.memory import share_one_arena
    from runtime.support.preload import preload_torch
    from runtime.support.version import refuse_clash

    refuse_clash()
    share_one_arena()
    preload_torch()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's processes, of which only the first is the server
        from runtime.workers.parallel.torchrun import follow_torchrun

        follow_torchrun(settings.parallel)
    import uvloop

    from runtime.support import logs

    logs.configure(settings.observability)

    def reread() -> Loaded:
        return read_settings(flags, config, model=model)

    code: int = uvloop.run(_serve(loaded, reread if loaded.file is not None else None))
    return code


async def _serve(loaded: Loaded, reread: Callable[[], Loaded] | None) -> int:
    from runtime.api.server import serve as run_server

    settings = loaded.settings

    def ready(url: str, model: str) -> None:
        gc.collect()
        gc.freeze()
        gc.enable()
        print(greeting(url, model, settings), flush=True)

    # The few hundred thousand objects of a loaded server stay: no collection needs to visit them, neither
    # during loading nor later, which would stop every stream for a tenth of a second, nor at the end.
    gc.disable()
    try:
        return await run_server(settings, on_ready=ready, origins=loaded.origins, reread=reread)
    finally:
        gc.enable()


def greeting(url: str, model: str, settings: Settings) -> str:
    """Text for a server that is ready: the banner, or how to reach its Unix socket."""
    if url.startswith("unix:"):
        curl = f"curl --unix-socket {shlex.quote(url.removeprefix('unix:'))} http://localhost/v1/models"
        return f"Serving at {url} (Ctrl-C stops it). Try:\n\n{curl}"
    needs_key = bool(settings.server.api_key) or settings.server.keys_file is not None
    return banner(url, model, needs_key=needs_key, page=settings.server.page_enabled)
