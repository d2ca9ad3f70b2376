"""What operators, orchestrators and Prometheus ask for. All of it answers while the model is loading."""

from typing import Any

from litestar import MediaType, Response, get, route
from msgspec import Struct

from runtime.api.auth import OPEN
from runtime.api.handle import AnyRequest, api_of
from runtime.errors import EngineUnavailable
from runtime.metrics import render_process
from runtime.version import version


class Status(Struct):
    status: str


class Version(Struct):
    version: str


class Load(Struct):
    server_load: int
    """Sequences in the engine, running and waiting: what vLLM calls it."""
    running: int
    waiting: int
    kv_cache_usage: float


@get("/health", opt={OPEN: True})
async def health(request: AnyRequest) -> Status:
    """Alive: 503 when the engine is dead or stuck. Loading is being alive."""
    return _health(request)


@route("/ping", http_method=["GET", "POST"], status_code=200)
async def ping(request: AnyRequest) -> Status:
    """As /health; the name that SageMaker asks for."""
    return _health(request)


@get("/ready", opt={OPEN: True})
async def ready(request: AnyRequest) -> Status:
    """Takes requests: 503 while loading and while draining."""
    service = api_of(request).handle.require()
    if not service.ready:
        raise EngineUnavailable("The server takes no new requests.")
    return Status("ready")


@get("/version")
async def get_version() -> Version:
    return Version(version())


@get("/load")
async def load(request: AnyRequest) -> Load:
    """How busy the engine is."""
    service = api_of(request).handle.service
    if service is None:
        return Load(0, 0, 0, 0.0)
    running, waiting = service.num_running, service.num_waiting
    return Load(running + waiting, running, waiting, service.kv_usage)


def metrics_handler(*, public: bool) -> Any:
    """GET /metrics; whether a key is asked for is a setting."""

    @get("/metrics", opt={OPEN: public}, media_type=MediaType.TEXT)
    async def metrics(request: AnyRequest) -> Response[bytes]:
        """Prometheus metrics; OpenMetrics when the Accept header asks for it."""
        accept = request.headers.get("accept", "")
        service = api_of(request).handle.service
        if service is None:
            content, media_type = render_process(accept)
        else:
            service.metrics.on_lag(await api_of(request).lag.take())
            content, media_type = service.metrics.render(accept)
        # As a header: Litestar would add a second charset to a media type.
        return Response(content, headers={"Content-Type": media_type})

    return metrics


def _health(request: AnyRequest) -> Status:
    service = api_of(request).handle.service
    if service is not None and not service.healthy:
        raise EngineUnavailable("The engine is dead or stuck.")
    return Status("ok")
