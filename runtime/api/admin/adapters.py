"""/admin/adapters: the library of adapters, for operators."""

from typing import TYPE_CHECKING, Any

from litestar import delete, get, post
from msgspec import UNSET, Struct, UnsetType

from runtime.api.admin.library import library_of
from runtime.api.auth import ADMIN
from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.intake import Intake
from runtime.errors import InvalidRequest
from runtime.trainer.adapters.records import AdapterRecord, Canary, Version

if TYPE_CHECKING:
    from runtime.trainer.adapters.library import AdapterLibrary


class VersionView(Struct, kw_only=True):
    """One version of an adapter."""

    id: str
    number: int
    current: bool
    loaded: bool
    """In memory now."""
    fits: bool
    """Made for the base model that is served."""
    created: float
    rank: int
    sha256: str
    job: str | None
    step: int | None
    metrics: dict[str, Any]


class AdapterView(Struct, kw_only=True):
    """One adapter."""

    name: str
    served: bool
    current: int
    created: float
    aliases: tuple[str, ...]
    canary: Canary | None
    versions: list[VersionView] | UnsetType = UNSET


class AdapterList(Struct, kw_only=True):
    adapters: list[AdapterView]


class Deleted(Struct, kw_only=True):
    id: str
    deleted: bool = True


class PromoteRequest(Struct, kw_only=True):
    """Which version the name should point to."""

    version: int


class AliasRequest(Struct, kw_only=True):
    """A second name."""

    alias: str


class CanaryRequest(Struct, kw_only=True):
    """A version, and its share of the requests; 0 takes it back."""

    version: int
    weight: float


_promote = Intake(PromoteRequest)
_alias = Intake(AliasRequest)
_canary = Intake(CanaryRequest)


@get("/admin/adapters", opt={ADMIN: True})
async def list_adapters(request: AnyRequest) -> AdapterList:
    """Every adapter, and what its name points to."""
    library = library_of(api_of(request))
    return AdapterList(adapters=[_view(library, record, versions=False) for record in library.list()])


@get("/admin/adapters/{name:str}", opt={ADMIN: True})
async def show_adapter(request: AnyRequest) -> AdapterView:
    """One adapter with all its versions."""
    library, name = _target(request)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/load", status_code=200, opt={ADMIN: True})
async def load_adapter(request: AnyRequest) -> AdapterView:
    """Serve an adapter that was unloaded."""
    library, name = _target(request)
    await library.load(name)
    return _shown(library, name)


@post("/admin/adapters/{name:str}/unload", status_code=200, opt={ADMIN: True})
async def unload_adapter(request: AnyRequest) -> AdapterView:
    """Serve an adapter no more, and free its memory once running requests have ended."""
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
    """Give the adapter another name too, taken from whoever had it."""
    library, name = _target(request)
    asked = await _alias.read(request, api_of(request))
    await library.set_alias(asked.alias, name)
    return _shown(library, name)


@delete("/admin/adapters/{name:str}/alias/{alias:str}", status_code=200, opt={ADMIN: True})
async def delete_alias(request: AnyRequest) -> AdapterView:
    """Take an alias away."""
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


@delete("/admin/adapters/{name:str}", status_code=200, opt={ADMIN: True})
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
    show_adapter,
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
    return library_of(api_of(request)), str(request.path_params["name"])


def _drain(request: AnyRequest) -> bool:
    values = {"": True, "1": True, "true": True, "0": False, "false": False}
    given = request.query_params.get("drain", "0")
    if given not in values:
        raise InvalidRequest(f"drain must be 1 or 0, got {given[:20]!r}.", param="drain")
    return values[given]


def _shown(library: "AdapterLibrary", name: str) -> AdapterView:
    """As it is now. Raises `NotFound`."""
    return _view(library, library.get(name))


def _view(library: "AdapterLibrary", record: AdapterRecord, *, versions: bool = True) -> AdapterView:
    return AdapterView(
        name=record.name,
        served=record.served,
        current=record.current,
        created=record.created,
        aliases=record.aliases,
        canary=record.canary,
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
    )
