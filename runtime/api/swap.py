"""Moving a running server to another model: drain and load, without a request lost.

Where the memory allows it, the new model is loaded beside the old one: requests that have begun end on the old model,
new ones go to the new one. Else the old one is drained and let go first, and new requests wait. Jobs, files and what
else is in the state directory stay open; adapters are served as far as they fit the new model. What fails leaves the
old model.
"""

import asyncio
import gc
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec
from msgspec import Struct

from runtime.api.handle import MOVING, ServiceHandle
from runtime.errors import Conflict, ModelNotFound, RequestError, Unsupported
from runtime.metrics import Metrics
from runtime.support.durable import without_paths
from runtime.support.event_loop import cancel
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.state_directory import state_directory
from runtime.support.threads import call_in_fresh_thread
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary
    from runtime.engine.service import EngineService
    from runtime.engine.state import MovingState, OpenedState

SwapMode = Literal["beside", "drain"]
"""Place in memory of the new model: beside the old one, or in its place."""
AskedMode = Literal["auto", "beside", "drain"]
MODES: tuple[AskedMode, ...] = get_args(AskedMode)

_ABORTED = "The server has moved to another model, and this request took longer than server.drain_timeout."

_log = get_logger("server")


class SwapFailure(Struct, frozen=True, kw_only=True):
    code: str
    message: str


class ModelSwap(Struct, kw_only=True):
    """One move to another model. Times are seconds since the epoch."""

    object: str = "model_swap"
    model: str
    """`NAME@VERSION`, or the name of the model that the server was started with."""
    previous: str
    mode: SwapMode | None = None
    """Null until the memory was looked at."""
    status: Literal["loading", "draining", "succeeded", "failed"] = "loading"
    """`loading`: the new model, in mode `beside` while the old one answers. `draining`: requests end on the old one, in
    mode `beside` while the new one answers."""
    started_at: float
    finished_at: float | None = None
    unfit_adapters: list[str] = []
    """Adapters that were served, and were made for another base model than the new one."""
    aborted: int = 0
    """Sequences that were not done on the old model after `server.drain_timeout`."""
    error: SwapFailure | None = None
    """Reason for a failure; the old model is served."""


class ModelSwapper:
    """The served model, and its moves. Event-loop thread only."""

    def __init__(
        self, handle: ServiceHandle, service: "EngineService", state: "OpenedState", settings: Settings
    ) -> None:
        """`service` is started, and serves the model that `settings` name."""
        self._handle = handle
        self._state = state
        self._first = settings
        self._settings = settings
        self.name = service.model_name
        """Name in requests, which stays the same."""
        self.service: EngineService | None = service
        """The served one; None while the old model is gone and the new one is not there."""
        self.label = service.label
        self.last: ModelSwap | None = None
        """The last move, or the one under way."""
        self.died = asyncio.Event()
        """Set when nothing can be served any more."""
        self._busy = False
        self._task: asyncio.Task[None] | None = None
        self._retiring = False
        """True while the old model has requests to end, beside the new one."""
        self._watch: asyncio.Task[None] | None = None
        self._watch_over(service)

    @property
    def models(self) -> list[str]:
        """The models that the server can move to: those in its state directory, and the one that it was started with.
        Blocks."""
        from runtime.checkpoints.model_library import ModelLibrary

        return [self.name, *ModelLibrary(state_directory(self._first)).labels()]

    async def begin(self, model: str, mode: AskedMode) -> ModelSwap:
        """Begin to move to `model`. Raises `ModelNotFound`, `Unsupported`, and `Conflict` while another move is under
        way, for the model that is served, and while there are jobs that have not ended."""
        from runtime.engine.state import MovingState

        if self._busy or self.service is None:
            raise Conflict("The server is moving to another model already.", code="swap_in_progress")
        if model == self.label:
            raise Conflict(f"`{model[:200]}` is served already.", param="model", code="already_served")
        self._busy = True
        moving = MovingState(self._state)
        try:
            settings = await asyncio.to_thread(self._settings_of, model)
            await moving.hold(MOVING)
        except BaseException:
            await moving.cancel()
            self._busy = False
            raise
        self.last = ModelSwap(model=model, previous=self.label, started_at=time.time())
        _log.info("model_swap_begun", model=model, previous=self.label)
        self._task = asyncio.create_task(self._move(self.last, settings, mode, moving))
        return self.last

    async def close(self, patience: float) -> None:
        """End a move that is under way, at the end of the server: requests on the old model get `patience` seconds."""
        if self._task is not None and self._retiring:
            await asyncio.wait({self._task}, timeout=patience)
        await cancel(self._task, self._watch)

    # -- a move --------------------------------------------------------------------------------

    async def _move(self, swap: ModelSwap, settings: Settings, mode: AskedMode, moving: "MovingState") -> None:
        metrics = self._handle.require().metrics
        try:
            swap.mode = await self._mode(settings, mode)
            if swap.mode == "beside":
                await self._beside(swap, settings, moving)
            else:
                await self._one_after_the_other(swap, settings, moving)
        except Exception as error:
            swap.error = _failure(error)
            await moving.cancel()
            _log.error("model_swap_failed", model=swap.model, code=swap.error.code, reason=str(error))
        finally:
            self._handle.gate.open()
            self._busy = False
        swap.finished_at = time.time()
        swap.status = "succeeded" if swap.error is None else "failed"
        metrics.on_model_swap(swap.status)
        if swap.error is None:
            _log.warning(
                "model_swapped",
                model=swap.model,
                previous=swap.previous,
                seconds=round(swap.finished_at - swap.started_at, 2),
                unfit_adapters=swap.unfit_adapters,
                aborted=swap.aborted,
            )

    async def _mode(self, settings: Settings, asked: AskedMode) -> SwapMode:
        from runtime.engine.assembly import fits_beside

        if asked != "auto":
            return asked
        blocks = self._handle.require().num_blocks
        return "beside" if await call_in_fresh_thread(fits_beside, settings, blocks) else "drain"

    async def _beside(self, swap: ModelSwap, settings: Settings, moving: "MovingState") -> None:
        before = self._handle.require()
        service, library = await self._load(swap.model, settings, before, moving)
        await self._switch(swap, service, library, settings, moving)
        swap.status, self._retiring = "draining", True
        try:
            await self._retire(swap, before, alone=False)
        finally:
            self._retiring = False

    async def _one_after_the_other(self, swap: ModelSwap, settings: Settings, moving: "MovingState") -> None:
        before, label, old_settings = self._handle.require(), self.label, self._settings
        swap.status = "draining"
        self._handle.gate.shut()
        await self._retire(swap, before, alone=True)
        swap.status = "loading"
        try:
            service, library = await self._load(swap.model, settings, before, moving)
        except Exception:
            try:
                service, library = await self._load(label, old_settings, before, moving)
            except Exception:
                _log.exception("old_model_not_loaded", model=label)
                self.died.set()
                raise
            await self._switch(swap, service, library, old_settings, moving)
            raise
        await self._switch(swap, service, library, settings, moving)

    async def _load(
        self, label: str, settings: Settings, before: "EngineService", moving: "MovingState"
    ) -> tuple["EngineService", "AdapterLibrary | None"]:
        """The started service of a model, and the adapters for it. Raises `ModelLoadError`, `StorageUnavailable`."""
        given = settings.cache.num_blocks, settings.cache.kv_memory
        if given == (None, None):  # else the cache would be made for what is free beside the old model
            cache = msgspec.structs.replace(settings.cache, num_blocks=before.num_blocks)
            settings = msgspec.structs.replace(settings, cache=cache)
        service = await call_in_fresh_thread(_load_service, label, settings, before.metrics)
        service.start()
        try:
            failpoint("swap.open", label)
            return service, await moving.open_for(service, settings)
        except BaseException:
            await service.stop(0.0)
            service.unload()
            raise

    async def _switch(
        self,
        swap: ModelSwap,
        service: "EngineService",
        library: "AdapterLibrary | None",
        settings: Settings,
        moving: "MovingState",
    ) -> None:
        """Have `service` be the served one: up to the first await nothing comes in between."""
        before = self._state.adapters
        if before is not None and library is not None:
            swap.unfit_adapters = [
                one.name
                for one in before.list()
                if one.served and before.fits(one.version) and not library.fits(one.version)
            ]
        self.service, self.label, self._settings = service, service.label, settings
        self._handle.replace(service)
        self._handle.gate.next_model()
        self._watch_over(service)
        await moving.finish(service, settings, library)

    async def _retire(self, swap: ModelSwap, service: "EngineService", *, alone: bool) -> None:
        """Let the requests of a model end, and let it go. `alone`: no other model is served meanwhile."""
        with suppress(TimeoutError):
            left = self._handle.gate.until_left(before=not alone)
            await asyncio.wait_for(left, self._first.server.drain_timeout)
        if alone:
            self.service = None
            self._handle.replace(None)
        swap.aborted = service.num_running + service.num_waiting
        await service.stop(0.0, why=_ABORTED)
        for key in service.engine.adapters - (frozenset() if self.service is None else self.service.engine.adapters):
            service.metrics.on_adapter_unloaded(key)
        service.unload()
        if not alone:
            service.set_adapters(None)
        if gc.get_freeze_count():  # what a server has loaded stays, and no collection needs to visit it
            gc.freeze()

    # -- parts ---------------------------------------------------------------------------------

    def _settings_of(self, model: str) -> Settings:
        """The settings for a model, under the name that is served. Blocks. Raises `ModelNotFound`, `Unsupported`."""
        from runtime.checkpoints.model_library import ModelLibrary
        from runtime.engine.assembly import is_under_torchrun

        if is_under_torchrun():
            raise Unsupported(
                "Ranks that torchrun has started hold one model from their start to their end: start the server again "
                f"with {model[:200]!r}."
            )
        if model == self.name:
            return self._first
        found: Path | None = ModelLibrary(state_directory(self._first)).find(model)
        if found is None:
            there = ", ".join(f"`{one}`" for one in self.models)
            raise ModelNotFound(f"The model `{model[:200]}` does not exist. This server has {there}.", param="model")
        changed = {"model": str(found), "served_model_name": self.name, "revision": None}
        return msgspec.structs.replace(self._first, model=msgspec.structs.replace(self._first.model, **changed))

    def _watch_over(self, service: "EngineService") -> None:
        async def watch() -> None:
            await service.died.wait()
            self.died.set()

        if self._watch is not None:
            self._watch.cancel()
        self._watch = asyncio.create_task(watch())


def _load_service(label: str, settings: Settings, metrics: Metrics) -> "EngineService":
    from runtime.engine.service import EngineService

    failpoint("swap.load", label)
    return EngineService.load(settings, metrics, label=label)


def _failure(error: Exception) -> SwapFailure:
    """The error as the operator reads it: of the model, or of the disk; another one is logged."""
    from runtime.model.config import ModelLoadError

    if isinstance(error, RequestError):
        return SwapFailure(code=error.code or error.type, message=error.message)
    if isinstance(error, ModelLoadError):
        return SwapFailure(code="model_not_loaded", message=without_paths(str(error)))
    _log.error("model_swap_broken", exc_info=error)
    return SwapFailure(code="internal_error", message="An internal error ended the move; the server's log has more.")
