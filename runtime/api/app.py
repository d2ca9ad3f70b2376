"""The app: routes, guard, error handler and middleware. Importable without a socket and without torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from litestar import Litestar
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from runtime.access import Access
from runtime.api import feedback
from runtime.api.admin import adapters, overview, system
from runtime.api.admin.adapters import load_lora_adapter, unload_lora_adapter
from runtime.api.admin.jobs import (
    cancel_job,
    delete_job,
    job_events,
    job_file,
    job_logs,
    job_metrics,
    job_recipe,
    job_report,
    list_jobs,
    pause_job,
    rerun_job,
    resume_job,
    retrieve_job,
)
from runtime.api.admin.overview import OverviewHistory
from runtime.api.admin.status import admin_status
from runtime.api.admin.train import recipe_schema, train
from runtime.api.anthropic.messages import count_message_tokens, create_message
from runtime.api.docs import openapi_config, prepared
from runtime.api.handle import Api, ServiceHandle
from runtime.api.http.auth import KeyGuard
from runtime.api.http.cors import Cors
from runtime.api.http.errors import handle_exception
from runtime.api.http.observe import Observer
from runtime.api.http.sockets import ResponseSockets
from runtime.api.inside import InsideClient
from runtime.api.openai import batches, files, fine_tuning, stored_chats
from runtime.api.openai.chat import create_batch_of_chats, create_chat_completion
from runtime.api.openai.completions import create_completion
from runtime.api.openai.embeddings import create_embeddings
from runtime.api.openai.invocations import invoke
from runtime.api.openai.models import delete_model, list_models, retrieve_model
from runtime.api.openai.scores import rerank, score
from runtime.api.openai.tokenize import detokenize, tokenize, tokenizer_info
from runtime.api.operations import (
    drain,
    end_drain,
    get_version,
    health,
    load,
    metrics_handler,
    ping,
    ready,
    reset_cache,
)
from runtime.api.page.routes import index_page, page_file
from runtime.api.responses import routes as responses
from runtime.support.event_loop import running
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService


def create_app(
    service: "EngineService | ServiceHandle",
    settings: Settings,
    access: Access | None = None,
    *,
    origins: Mapping[str, str] | None = None,
) -> Litestar:
    """The ASGI app. Give a `ServiceHandle` to answer while the engine loads: fill it in later.

    `access`: made from the settings by default. `origins`: where each setting came from, by key. Raises
    `KeysFileError`.
    """
    handle = service if isinstance(service, ServiceHandle) else ServiceHandle(service)
    access = access or Access(settings)
    api = Api(handle, settings, access, origins or {})
    history = OverviewHistory(handle)
    app = Litestar(
        route_handlers=[
            create_chat_completion,
            create_batch_of_chats,
            *stored_chats.ROUTES,
            create_completion,
            invoke,
            create_message,
            count_message_tokens,
            *responses.ROUTES,
            list_models,
            retrieve_model,
            delete_model,
            tokenize,
            detokenize,
            tokenizer_info,
            create_embeddings,
            score,
            rerank,
            *files.ROUTES,
            *batches.ROUTES,
            *fine_tuning.ROUTES,
            train,
            recipe_schema,
            list_jobs,
            retrieve_job,
            job_events,
            job_metrics,
            job_logs,
            job_recipe,
            job_file,
            cancel_job,
            rerun_job,
            job_report,
            pause_job,
            resume_job,
            delete_job,
            health,
            ready,
            ping,
            get_version,
            load,
            load_lora_adapter,
            unload_lora_adapter,
            *adapters.ROUTES,
            *overview.ROUTES,
            admin_status,
            *system.ROUTES,
            *feedback.ROUTES,
            reset_cache,
            drain,
            end_drain,
            metrics_handler(public=settings.server.public_metrics),
            *((index_page, page_file) if settings.server.page_enabled else ()),
        ],
        # On the app, not on a middleware that looks at paths: `//v1/models`, `/%761/models` and `/v1/models/`
        # all reach the same handlers, and a guard runs once a handler is chosen.
        guards=[KeyGuard(access)],
        state=State({"api": api, "history": history}),
        exception_handlers={Exception: handle_exception},
        lifespan=[
            lambda app: running(api.lag.run()),
            lambda app: running(history.run()),
            lambda app: access.watching(),
            prepared,
        ],
        on_shutdown=[api.background.cancel_all],
        openapi_config=openapi_config(settings.server.root_path) if settings.server.docs_enabled else None,
        logging_config=None,
        debug=False,
    )
    handle.inside = InsideClient(app, access, handle.gate)
    if access.cors_origins:
        app.asgi_handler = Cors(app, access.cors_origins)
    app.asgi_handler = Observer(app.asgi_handler, handle, api.observability, audit=access.audit)
    if settings.server.root_path:
        app.asgi_handler = Prefixed(app.asgi_handler, settings.server.root_path)
    app.asgi_handler = ResponseSockets(app.asgi_handler, settings.server)
    return app


class Prefixed:
    """A prefix of all paths, for servers behind a proxy that routes by path (`--root-path`).

    Some proxies take the prefix off and some leave it on, so both forms of a path are answered. Links and `Location`
    headers have it. The names of handlers, metrics and logs are those without it.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """An ASGI app around `app`, which sees paths without `prefix` (as `/llm`, with no slash at its end)."""
        self._app = app
        self._prefix = prefix
        self._raw_prefix = prefix.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path == self._prefix or path.startswith(f"{self._prefix}/"):
            scope["path"] = path[len(self._prefix) :] or "/"
            raw = scope.get("raw_path") or b""
            if raw.startswith(self._raw_prefix):
                scope["raw_path"] = raw[len(self._raw_prefix) :] or b"/"

        async def send_prefixed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, self._raw_prefix + value if name.lower() == b"location" and value[:1] == b"/" else value)
                    for name, value in message.get("headers", ())
                ]
            await send(message)

        await self._app(scope, receive, send_prefixed)
