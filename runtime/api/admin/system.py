"""GET /admin/system: machine, model, health, versions, settings and keys of this server, for operators; and its moves
to other models."""

import asyncio
import importlib.metadata
import os
import platform
import shutil
from typing import Any, Literal

import psutil
from litestar import get, post
from msgspec import Struct, to_builtins

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import ADMIN
from runtime.api.http.query import check_names
from runtime.api.http.record import record_of
from runtime.api.openai.schema import Intake
from runtime.api.swap import AskedMode, ModelSwap, ModelSwapper
from runtime.errors import EngineUnavailable
from runtime.support.machine import Gpu, Machine, this_machine
from runtime.support.state_directory import state_directory
from runtime.support.version import version
from settings import fields, values

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "msgspec", "litestar", "uvicorn", "uvloop", "llguidance",
    "pyarrow", "peft", "triton", "flash-attn", "bitsandbytes",
)  # fmt: skip
"""Distributions whose versions are listed, where they are installed."""

Health = Literal["loading", "ready", "draining", "unhealthy"]


class ServedModel(Struct, kw_only=True):
    """The model that is served, and what computes it."""

    name: str
    max_model_len: int
    """Longest sequence, in tokens."""
    quantization: str
    kernels: str | None
    """Backend of the ops; null where ranks compute."""
    kv_blocks: int
    kv_block_size: int
    """Tokens of a block."""


class ProcessFacts(Struct, kw_only=True):
    """The server's process."""

    pid: int
    started: float
    """Seconds since the epoch."""
    memory: int
    """Resident memory in bytes."""
    threads: int


class StateFacts(Struct, kw_only=True):
    """The state directory."""

    directory: str
    free: int | None
    """Free bytes of its file system; null where there is no such directory."""
    problem: str | None
    """Reason why nothing can be stored there; null if there is none."""


class SettingView(Struct, kw_only=True):
    """One setting. A secret's value is not shown."""

    key: str
    value: str
    """As in a settings file; "" for none."""
    origin: str
    """`default`, or the flag, the variable or the file that gave it."""
    doc: str


class KeyView(Struct, kw_only=True):
    """One API key, without the key."""

    name: str
    scopes: list[str]
    limits: dict[str, float]
    """Limits that are set, by name."""


class SystemView(Struct, kw_only=True):
    """The server as its operators see it."""

    object: str = "system"
    health: Health
    version: str
    model: ServedModel | None
    """Null while it is loading."""
    machine: Machine
    gpus: list[Gpu]
    process: ProcessFacts
    state: StateFacts
    versions: dict[str, str]
    """Distribution → its version."""
    settings: list[SettingView]
    asks_for_keys: bool
    """Inference needs a key."""
    keys: list[KeyView]


# -- the model -------------------------------------------------------------------------------------
#
# GET /admin/model and POST /admin/model/swap.


class ModelView(Struct, kw_only=True):
    """The served model, and the models that the server can move to."""

    object: str = "model"
    name: str
    """Name in requests, which stays the same."""
    model: str
    """The model behind it: `NAME@VERSION`, or the name of the one that the server was started with."""
    models: list[str]
    swap: ModelSwap | None
    """The last move, or the one under way."""


class SwapRequest(Struct, kw_only=True):
    """The model to move to."""

    model: str
    """`NAME@VERSION`, as a job without an adapter has published it, or the name of the model that the server was
    started with."""
    mode: AskedMode = "auto"
    """`beside`: load it beside the old model, which answers meanwhile; `drain`: let the old one go first, and have new
    requests wait; `auto`: beside where the memory allows it."""


_swap = Intake(SwapRequest)


@get("/admin/model", opt={ADMIN: True})
async def show_model(request: AnyRequest) -> ModelView:
    """The served model, the models that the server can move to, and the last move."""
    check_names(request, ())
    swapper = _swapper(request)
    models = await asyncio.to_thread(lambda: swapper.models)
    return ModelView(name=swapper.name, model=swapper.label, models=models, swap=swapper.last)


@post("/admin/model/swap", status_code=202, opt={ADMIN: True, BODY: SwapRequest})
async def swap_model(request: AnyRequest) -> ModelSwap:
    """Begin to move the server to another model: requests that have begun end on the old one. GET /admin/model tells
    how it goes."""
    check_names(request, ())
    asked = await _swap.read(request, api_of(request))
    record_of(request).target = asked.model[:200]
    return await _swapper(request).begin(asked.model, asked.mode)


def _swapper(request: AnyRequest) -> ModelSwapper:
    handle = api_of(request).handle
    swapper: ModelSwapper | None = handle.swapper
    if swapper is None:
        handle.require()
        raise EngineUnavailable("This server cannot move to another model.")
    return swapper


# -- the system ------------------------------------------------------------------------------------


@get("/admin/system", opt={ADMIN: True})
async def system(request: AnyRequest) -> SystemView:
    """Machine, model, health, versions, each setting with where it came from, and the keys' names and scopes."""
    check_names(request, ())
    api = api_of(request)
    (machine, process, state), versions = await asyncio.gather(
        asyncio.to_thread(_facts, api), asyncio.to_thread(_versions)
    )
    return SystemView(
        health=_health(api),
        version=version(),
        model=_model(api),
        machine=machine,
        gpus=[] if api.handle.service is None else api.handle.service.gpus,
        process=process,
        state=state,
        versions=versions,
        settings=_settings(api),
        asks_for_keys=api.access.asks_for_keys,
        keys=_keys(api),
    )


def _facts(api: Api) -> tuple[Machine, ProcessFacts, StateFacts]:
    """Facts that the system's files are read for."""
    own = psutil.Process()
    with own.oneshot():
        process = ProcessFacts(
            pid=os.getpid(), started=own.create_time(), memory=own.memory_info().rss, threads=own.num_threads()
        )
    directory = state_directory(api.settings)
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        free = None
    return this_machine(), process, StateFacts(directory=str(directory), free=free, problem=api.handle.problem)


def _health(api: Api) -> Health:
    service = api.handle.service
    if service is None:
        return "loading"
    if not service.healthy:
        return "unhealthy"
    return "ready" if service.ready else "draining"


def _model(api: Api) -> ServedModel | None:
    service = api.handle.service
    if service is None:
        return None
    return ServedModel(
        name=service.model_name,
        max_model_len=service.max_model_len,
        quantization=api.settings.model.quantization,
        kernels=service.kernels,
        kv_blocks=service.num_blocks,
        kv_block_size=service.block_size,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def _settings(api: Api) -> list[SettingView]:
    found = []
    for field in fields.fields():
        value: Any = getattr(getattr(api.settings, field.section), field.name)
        origin = api.origins.get(field.key) or ("default" if value == field.default else "this program")
        found.append(SettingView(key=field.key, value=values.show(field, value), origin=origin, doc=field.doc))
    return found


def _keys(api: Api) -> list[KeyView]:
    found = []
    for principal in api.access.ring.principals:
        limits = {name: value for name, value in to_builtins(principal.limits).items() if value is not None}
        found.append(KeyView(name=principal.name, scopes=sorted(principal.scopes), limits=limits))
    return found


ROUTES: tuple[Any, ...] = (system, show_model, swap_model)
