"""/admin/adapters: the library of adapters, for operators."""

import asyncio
from typing import TYPE_CHECKING, Any

from litestar import MediaType, Response, delete, get, post
from msgspec import UNSET, Struct, UnsetType

from runtime.adapters.card import Prompt
from runtime.adapters.store import AdapterRecord, Canary, Version
from runtime.api.admin.export import export_adapter
from runtime.api.admin.uploads import NAME_PART, receive_adapter
from runtime.api.admin.views import allowed_folder, library_of
from runtime.api.docs import BINARY, BODY, FORM, QUERY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.auth import ADMIN, TRAIN
from runtime.api.http.query import check_names, flag
from runtime.api.http.record import record_of
from runtime.api.openai.schema import Intake
from runtime.errors import InvalidRequest, NotFound
from runtime.metrics import AdapterTraffic
from runtime.support.durable import remove, storage_unavailable

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary


class VersionView(Struct, kw_only=True):
    """One version of an adapter."""

    id: str
    number: int
    current: bool
    loaded: bool
    """True while it is in memory."""
    fits: bool
    """True if it was made for the base model that is served."""
    created: float
    rank: int
    sha256: str
    job: str | None
    step: int | None
    metrics: dict[str, Any]
    path: str
    """Folder on the server with its files, in PEFT's format; `GET …/export` gives them."""
    traffic: AdapterTraffic | None
    """Requests since it was loaded; null for one that is not in memory."""
    prompt: Prompt | None
    """Prompt format of the training rows; null for a version that was not trained here."""
    went_on_from: str | None
    """Adapter that its training began with, `name@version` or a folder's name; null: fresh weights."""


class AdapterView(Struct, kw_only=True):
    """One adapter."""

    name: str
    served: bool
    current: int
    created: float
    aliases: tuple[str, ...]
    canary: Canary | None
    revision: int | None = None
    """Revision of the name in the store that servers share, as this server has it; null without such a store."""
    versions: list[VersionView] | UnsetType = UNSET


class AdapterList(Struct, kw_only=True, omit_defaults=True):
    adapters: list[AdapterView]
    shared_problem: str | None = None
    """Reason why the store that servers share cannot be reached now: adapters are served as they are, and nothing can
    be changed. Absent otherwise."""


class Deleted(Struct, kw_only=True):
    id: str
    deleted: bool = True


class PromoteRequest(Struct, kw_only=True):
    """The version that the name should point to."""

    version: int


class AliasRequest(Struct, kw_only=True):
    """A second name."""

    alias: str


class CanaryRequest(Struct, kw_only=True):
    """A version, and its share of the requests, from 0 to 1; 0 ends the canary."""

    version: int
    weight: float


UPLOAD = "/admin/adapters/upload"
"""Also the path of an adapter named `upload`, so its GET and DELETE are answered as those of others."""

_UPLOAD_FORM = {
    "type": "object",
    "properties": {NAME_PART: {"type": "string"}, "file": {"type": "array", "items": BINARY}},
    "required": ["file"],
}

_promote = Intake(PromoteRequest)
_alias = Intake(AliasRequest)
_canary = Intake(CanaryRequest)


@get("/admin/adapters", opt={TRAIN: True})
async def list_adapters(request: AnyRequest) -> AdapterList:
    """Every adapter, with the version that its name points to."""
    return adapter_list(library_of(api_of(request)))


def adapter_list(library: "AdapterLibrary") -> AdapterList:
    """All adapters of a library, without their versions."""
    views = [_view(library, record, versions=False) for record in library.list()]
    return AdapterList(adapters=views, shared_problem=library.shared_problem)


@get(["/admin/adapters/{name:str}", UPLOAD], opt={TRAIN: True})
async def show_adapter(request: AnyRequest) -> AdapterView:
    """One adapter with all its versions."""
    library, name = _target(request)
    return _shown(library, name)


@post(UPLOAD, status_code=201, opt={ADMIN: True, FORM: _UPLOAD_FORM, QUERY: {NAME_PART: {"type": "string"}}})
async def upload_adapter(request: AnyRequest) -> AdapterView:
    """Publish an adapter that the body brings, as a new version of `name`: a folder of PEFT's as a tar archive (plain
    or gzipped), or its files as a form. `name` is in the query, or a part of the form."""
    api = api_of(request)
    library = library_of(api)
    check_names(request, (NAME_PART,))
    name = request.query_params.get(NAME_PART)
    if name is not None:
        library.check_free(name, NAME_PART)  # before gigabytes are sent in vain
    try:
        folder = await asyncio.to_thread(library.make_incoming)
    except OSError as error:
        raise storage_unavailable("The adapter cannot be stored", error) from error
    try:
        upload = await receive_adapter(request, api.settings, folder)
        if name is not None and upload.name is not None:
            raise InvalidRequest("The adapter's name is both in the address and in the form.", param=NAME_PART)
        name = name or upload.name
        if not name:
            how = f"add ?{NAME_PART}=NAME to the address, or a part `{NAME_PART}` to the form"
            raise InvalidRequest(f"The adapter has no name: {how}.", param=NAME_PART)
        record_of(request).target = name
        await library.publish(name, upload.folder)
    finally:
        await asyncio.to_thread(remove, folder)
    if upload.left_out:
        left = len(upload.left_out)
        listed = ", ".join(upload.left_out[:5]) + (f" and {left - 5} more" if left > 5 else "")
        record_of(request).warnings.append(f"no part of the adapter, left out: {listed}")
    return _shown(library, name)


@post("/admin/adapters/{name:str}/load", status_code=200, opt={ADMIN: True})
async def load_adapter(request: AnyRequest) -> AdapterView:
    """Serve an adapter that was unloaded."""
    library, name = _target(request)
    await library.load(name)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/unload", status_code=200, opt={ADMIN: True})
async def unload_adapter(request: AnyRequest) -> AdapterView:
    """Stop serving an adapter, and free its memory once running requests have ended."""
    library, name = _target(request)
    await library.unload(name)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/promote", status_code=200, opt={ADMIN: True, BODY: PromoteRequest})
async def promote_adapter(request: AnyRequest) -> AdapterView:
    """Point the name to another version."""
    library, name = _target(request)
    asked = await _promote.read(request, api_of(request))
    await library.promote(name, asked.version)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/rollback", status_code=200, opt={ADMIN: True})
async def roll_back_adapter(request: AnyRequest) -> AdapterView:
    """Point the name to the version before."""
    library, name = _target(request)
    await library.rollback(name)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/alias", status_code=200, opt={ADMIN: True, BODY: AliasRequest})
async def set_alias(request: AnyRequest) -> AdapterView:
    """Add another name. An adapter that has this name as an alias loses it."""
    library, name = _target(request)
    asked = await _alias.read(request, api_of(request))
    await library.set_alias(asked.alias, name)
    return _shown(library, name)


@delete("/admin/adapters/{name:str}/alias/{alias:str}", status_code=200, opt={ADMIN: True})
async def delete_alias(request: AnyRequest) -> AdapterView:
    """Delete an alias."""
    library, name = _target(request)
    await library.delete_alias(str(request.path_params["alias"]), name)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/canary", status_code=200, opt={ADMIN: True, BODY: CanaryRequest})
async def set_canary(request: AnyRequest) -> AdapterView:
    """Send a share of the requests to another version."""
    library, name = _target(request)
    asked = await _canary.read(request, api_of(request))
    await library.set_canary(name, asked.version, asked.weight)
    return _shown(library, name)


@delete(["/admin/adapters/{name:str}", UPLOAD], status_code=200, opt={ADMIN: True})
async def delete_adapter(request: AnyRequest) -> Deleted:
    """Delete an adapter and its versions. 409 while it is in use, unless `?drain=1`."""
    library, name = _target(request)
    await library.delete(name, drain=_drain(request))
    return Deleted(id=name)


@delete("/admin/adapters/{name:str}/versions/{number:int}", status_code=200, opt={ADMIN: True})
async def delete_version(request: AnyRequest) -> Deleted:
    """Delete one version that is not the current one."""
    library, name = _target(request)
    number = int(request.path_params["number"])
    await library.delete_version(name, number, drain=_drain(request))
    return Deleted(id=f"{name}@{number}")


ROUTES = (
    list_adapters,
    upload_adapter,
    show_adapter,
    export_adapter,
    load_adapter,
    unload_adapter,
    promote_adapter,
    roll_back_adapter,
    set_alias,
    delete_alias,
    set_canary,
    delete_adapter,
    delete_version,
)


def _target(request: AnyRequest) -> "tuple[AdapterLibrary, str]":
    """The library, and the name in the path. Raises `StorageUnavailable`."""
    return library_of(api_of(request)), str(request.path_params.get("name", "upload"))


def _drain(request: AnyRequest) -> bool:
    check_names(request, ("drain",))
    return flag(request, "drain", empty=True)


def _shown(library: "AdapterLibrary", name: str) -> AdapterView:
    """The current view of an adapter. Raises `NotFound`."""
    return _view(library, library.get(name))


def _view(library: "AdapterLibrary", record: AdapterRecord, *, versions: bool = True) -> AdapterView:
    return AdapterView(
        name=record.name,
        served=record.served,
        current=record.current,
        created=record.created,
        aliases=record.aliases,
        canary=record.canary,
        revision=library.revision(record.name),
        versions=[_version(library, record, v) for v in record.versions.values()] if versions else UNSET,
    )


def _version(library: "AdapterLibrary", record: AdapterRecord, version: Version) -> VersionView:
    return VersionView(
        id=version.id,
        number=version.number,
        current=version.number == record.current,
        loaded=library.is_loaded(version),
        fits=library.fits(version),
        created=version.created,
        rank=version.rank,
        sha256=version.sha256,
        job=version.job,
        step=version.step,
        metrics=version.metrics,
        path=str(library.directory(version)),
        traffic=library.traffic(version),
        prompt=library.card(version).prompt,
        went_on_from=library.card(version).went_on_from,
    )


# -- lora ------------------------------------------------------------------------------------------
#
# POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shape: clients of its server work here unchanged.


class LoadLoraRequest(Struct, kw_only=True):
    """Folder of an adapter to load, and its name."""

    lora_name: str
    lora_path: str
    """A folder on the server, in PEFT's format; under trainer.data_roots or the state directory."""
    load_inplace: bool = False
    """True: replace a loaded adapter of this name."""


class UnloadLoraRequest(Struct, kw_only=True):
    """Name of the adapter to unload."""

    lora_name: str


_load = Intake(LoadLoraRequest)
_unload = Intake(UnloadLoraRequest)


@post("/v1/load_lora_adapter", status_code=200, opt={ADMIN: True, BODY: LoadLoraRequest}, media_type=MediaType.TEXT)
async def load_lora_adapter(request: AnyRequest) -> Response[str]:
    """Copy an adapter into the library, and serve it under its name."""
    api = api_of(request)
    library = library_of(api)
    asked = await _load.read(request, api)
    record_of(request).target = asked.lora_name
    if not asked.lora_name or not asked.lora_path:
        missing = "lora_path" if asked.lora_name else "lora_name"
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
    folder = await asyncio.to_thread(allowed_folder, asked.lora_path, api, param="lora_path")
    await library.load_external(asked.lora_name, folder, inplace=asked.load_inplace)
    return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.", media_type=MediaType.TEXT)


@post("/v1/unload_lora_adapter", status_code=200, opt={ADMIN: True, BODY: UnloadLoraRequest}, media_type=MediaType.TEXT)
async def unload_lora_adapter(request: AnyRequest) -> Response[str]:
    """Stop serving an adapter. Its versions stay in the library."""
    api = api_of(request)
    library = library_of(api)
    asked = await _unload.read(request, api)
    record_of(request).target = asked.lora_name
    if not asked.lora_name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    if library.resolve(asked.lora_name) is None:
        raise NotFound(f"The lora adapter '{asked.lora_name[:200]}' cannot be found.", param="lora_name")
    await library.unload(asked.lora_name)
    return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.", media_type=MediaType.TEXT)
