"""Endpoints for operators, orchestrators and Prometheus. All answer while the model is loading."""

import asyncio
from typing import Any

from litestar import MediaType, Response, delete, get, post, route
from msgspec import Struct

from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.auth import ADMIN, OPEN
from runtime.errors import EngineUnavailable
from runtime.metrics import render_process
from runtime.support.version import version


class ServerStatus(Struct):
    status: str


class ServerVersion(Struct):
    version: str


class ServerLoad(Struct):
    server_load: int
    """Number of sequences in the engine, running and waiting; vLLM's name."""
    running: int
    waiting: int
    kv_cache_usage: float


@get("/health", opt={OPEN: True})
async def health(request: AnyRequest) -> ServerStatus:
    """Liveness: 503 when the engine is dead or stuck; 200 while it is loading."""
    return _health(request)


@route("/ping", http_method=["GET", "POST"], status_code=200)
async def ping(request: AnyRequest) -> ServerStatus:
    """Same as /health; the path that SageMaker requires."""
    return _health(request)


@get("/ready", opt={OPEN: True})
async def ready(request: AnyRequest) -> ServerStatus:
    """Readiness: 503 while loading and while draining."""
    service = api_of(request).handle.require()
    if not service.ready:
        raise EngineUnavailable("The server takes no new requests.")
    return ServerStatus("ready")


@get("/version")
async def get_version() -> ServerVersion:
    """The server's version."""
    return ServerVersion(version())


@get("/load")
async def load(request: AnyRequest) -> ServerLoad:
    """Load of the engine."""
    service = api_of(request).handle.service
    if service is None:
        return ServerLoad(0, 0, 0, 0.0)
    running, waiting = service.num_running, service.num_waiting
    return ServerLoad(running + waiting, running, waiting, service.kv_usage)


def metrics_handler(*, public: bool) -> Any:
    """GET /metrics; `public`: no key is required."""

    @get("/metrics", opt={OPEN: public}, media_type=MediaType.TEXT)
    async def metrics(request: AnyRequest) -> Response[bytes]:
        """Prometheus metrics; OpenMetrics if the Accept header names it."""
        accept = request.headers.get("accept", "")
        service = api_of(request).handle.latest
        if service is None:
            content, media_type = render_process(accept)
        else:
            service.metrics.on_loop(lag=await api_of(request).lag.take(), tasks=len(asyncio.all_tasks()))
            content, media_type = await asyncio.to_thread(service.scrape, accept)
        # As a header: Litestar would add a second charset to a media type.
        return Response(content, headers={"Content-Type": media_type})

    return metrics


def _health(request: AnyRequest) -> ServerStatus:
    service = api_of(request).handle.service
    if service is not None and not service.healthy:
        raise EngineUnavailable("The engine is dead or stuck.")
    return ServerStatus("ok")


# -- prefix cache ----------------------------------------------------------------------------------
#
# POST /admin/cache/reset.


class CacheReset(Struct):
    """Result of a cache reset."""

    blocks: int
    """Number of cached KV blocks that were dropped."""


@post("/admin/cache/reset", status_code=200, opt={ADMIN: True})
async def reset_cache(request: AnyRequest) -> CacheReset:
    """Drop all cached prefixes. Running requests continue undisturbed; new ones compute their prompts again."""
    service = api_of(request).handle.require()
    return CacheReset(blocks=await service.reset_prefixes())


# -- draining --------------------------------------------------------------------------------------
#
# POST and DELETE /admin/drain.


class DrainState(Struct):
    """Sequences at work while a server drains."""

    draining: bool
    running: int
    """Sequences. Training goes on; batches wait."""
    waiting: int


@post("/admin/drain", status_code=200, opt={ADMIN: True})
async def drain(request: AnyRequest) -> DrainState:
    """Take no new requests: they get 503, and /ready says so. What is at work goes on, training too; batches wait."""
    api_of(request).handle.require().drain()
    return _drain_state(request)


@delete("/admin/drain", status_code=200, opt={ADMIN: True})
async def end_drain(request: AnyRequest) -> DrainState:
    """Take requests again. A server that is shutting down does not."""
    api_of(request).handle.require().end_drain()
    return _drain_state(request)


def _drain_state(request: AnyRequest) -> DrainState:
    service = api_of(request).handle.require()
    return DrainState(not service.ready, service.num_running, service.num_waiting)
