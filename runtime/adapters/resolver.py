"""Adapters that are looked for when a request first names them: in a folder of the operator's, or on the hub.

vLLM calls this LoRA resolvers. What is found is published like any other adapter, so that it is checked, copied and
named once, and served from the library from then on; the sources are not watched for changes.
"""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import Struct

from runtime.adapters.card import CARD
from runtime.adapters.store import name_problem
from runtime.checkpoints.peft import CONFIG, WEIGHTS, AdapterInvalid
from runtime.errors import AdapterUnavailable, Conflict, RequestError
from runtime.model.config import ModelLoadError
from runtime.support.durable import remove, storage_unavailable
from runtime.support.logs import get_logger
from settings.schema import AdapterSettings

RETRY_SECONDS = 30.0
"""After a failure on the hub, the same name is not asked for again for so long."""

_log = get_logger("adapters")


class AdapterSources(Struct, frozen=True):
    """The places that are searched."""

    folder: Path | None = None
    """Holds a folder for each adapter, of the adapter's name."""
    hub: dict[str, str] = {}
    """Name → repository, with `@` and a revision where one is meant."""

    @classmethod
    def of(cls, settings: AdapterSettings) -> "AdapterSources":
        pairs = (entry.partition("=") for entry in settings.resolve_hub)
        folder = settings.resolve_folder
        return cls(
            None if folder is None else Path(folder).expanduser(), {name: repository for name, _, repository in pairs}
        )


class AdapterResolver:
    """Publishes unknown adapters that a source has. Event loop only; other threads read and copy files."""

    def __init__(
        self,
        sources: AdapterSources,
        *,
        make_folder: Callable[[], Path],
        publish: Callable[[str, Path], Awaitable[object]],
    ) -> None:
        """`make_folder` makes an empty folder for files on their way to `publish`; it blocks."""
        self._sources = sources
        self._make_folder = make_folder
        self._publish = publish
        self._running: dict[str, asyncio.Future[None]] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        """Name → time and message of the last failure."""

    async def look_for(self, name: str) -> None:
        """Publish the adapter `name`, which the library does not have, where a source has it; requests for it that come
        meanwhile wait for the same work.

        Raises `AdapterUnavailable` where it is there and cannot be used, or the hub cannot be asked.
        """
        if (self._sources.folder is None and name not in self._sources.hub) or name_problem(name) is not None:
            return
        if name not in self._running:
            task = asyncio.ensure_future(self._resolve(name))
            self._running[name] = task
            task.add_done_callback(lambda _: self._running.pop(name))
        await asyncio.shield(self._running[name])

    async def close(self) -> None:
        """Wait for what is being published."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _resolve(self, name: str) -> None:
        failed_at, message = self._failed.pop(name, (0.0, ""))
        if message and time.monotonic() - failed_at < RETRY_SECONDS:
            self._failed[name] = failed_at, message
            raise AdapterUnavailable(message, param="model")
        try:
            folder = await asyncio.to_thread(self._make_folder)
        except OSError as error:
            raise storage_unavailable(f"The adapter `{name}` cannot be stored", error) from error
        try:
            if await asyncio.to_thread(self._collect, name, folder):
                await self._publish(name, folder)
                _log.info("adapter_resolved", adapter=name)
        except Conflict:
            return  # it has this name's letters in another case, or was published meanwhile: the library decides
        except (AdapterInvalid, ModelLoadError, OSError) as error:
            _log.warning("adapter_not_resolved", adapter=name, reason=str(error))
            problem = error.message if isinstance(error, RequestError) else "it cannot be read; the log says why."
            message = f"The adapter `{name}` is there, and cannot be used: {problem}"
            if name in self._sources.hub:
                self._failed[name] = time.monotonic(), message
            raise AdapterUnavailable(message, param="model") from error
        finally:
            await asyncio.to_thread(remove, folder)

    def _collect(self, name: str, target: Path) -> bool:
        """Copy the adapter's files into `target`; False where no source has it."""
        source = self._find(name)
        if source is None:
            return False
        for file in (CONFIG, WEIGHTS, CARD):
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)
        return True

    def _find(self, name: str) -> Path | None:
        root = self._sources.folder
        # A link in the operator's folder may lead anywhere; the name, which a client chose, has no slash and no `..`.
        if root is not None and (root / name / CONFIG).is_file():
            return root / name
        if name not in self._sources.hub:
            return None
        from runtime.checkpoints.resolve import fetch

        repository, _, revision = self._sources.hub[name].partition("@")
        return fetch(repository, revision=revision or None, files=[CONFIG, WEIGHTS, CARD])
