"""The app: routes, guard, errors, and what wraps them all. Importable without a socket and without torch."""

from typing import TYPE_CHECKING

from litestar import Litestar
from litestar.datastructures import State

from runtime.api.admin import adapters
from runtime.api.admin.cache import reset_cache
from runtime.api.admin.jobs import (
    cancel_job,
    job_events,
    job_logs,
    job_metrics,
    list_jobs,
    pause_job,
    resume_job,
    retrieve_job,
)
from runtime.api.admin.lora import load_lora_adapter, unload_lora_adapter
from runtime.api.admin.train import train
from runtime.api.auth import KeyGuard
from runtime.api.docs import openapi_config
from runtime.api.errors import handle_exception
from runtime.api.handle import Api, ServiceHandle
from runtime.api.observe import Observer
from runtime.api.openai.chat import create_chat_completion
from runtime.api.openai.completions import create_completion
from runtime.api.openai.models import list_models, retrieve_model
from runtime.api.openai.tokenize import detokenize, tokenize
from runtime.api.operations import get_version, health, load, metrics_handler, ping, ready
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService


def create_app(service: "EngineService | ServiceHandle", settings: Settings) -> Litestar:
    """The ASGI app. Give a `ServiceHandle` to answer while the engine loads: fill it in later."""
    handle = service if isinstance(service, ServiceHandle) else ServiceHandle(service)
    api = Api(handle, settings)
    app = Litestar(
        route_handlers=[
            create_chat_completion,
            create_completion,
            list_models,
            retrieve_model,
            tokenize,
            detokenize,
            train,
            list_jobs,
            retrieve_job,
            job_events,
            job_metrics,
            job_logs,
            cancel_job,
            pause_job,
            resume_job,
            health,
            ready,
            ping,
            get_version,
            load,
            load_lora_adapter,
            unload_lora_adapter,
            *adapters.ROUTES,
            reset_cache,
            metrics_handler(public=settings.server.public_metrics),
        ],
        # On the app, not on a middleware that looks at paths: `//v1/models`, `/%761/models` and `/v1/models/`
        # all reach the same handlers, and a guard runs once a handler is chosen.
        guards=[KeyGuard(settings.server.api_key, settings.server.admin_key)],
        state=State({"api": api}),
        exception_handlers={Exception: handle_exception},
        lifespan=[api.lag.running],
        openapi_config=openapi_config() if settings.server.docs_enabled else None,
        logging_config=None,
        debug=False,
    )
    app.asgi_handler = Observer(app.asgi_handler, handle, log_requests=settings.observability.log_requests)
    return app
