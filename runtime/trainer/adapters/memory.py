"""Which versions are in memory: a bounded number, loaded when they are first asked for."""

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from runtime.errors import AdaptersBusy, AdapterUnavailable
from runtime.logs import get_logger
from runtime.metrics import Metrics
from runtime.trainer.adapters.files import digest
from runtime.trainer.adapters.records import Version
from runtime.workers.loading.peft import AdapterInvalid
from runtime.workers.lora_base import LoraBase

_log = get_logger("adapters")


class AdapterHost(Protocol):
    """Who applies adapters: the engine's service."""

    model_name: str
    lora_base: LoraBase
    metrics: Metrics

    async def load_adapter(self, key: str, directory: str) -> None: ...

    async def unload_adapter(self, key: str) -> None: ...

    def adapter_in_use(self, key: str) -> bool: ...


class LoadedVersions:
    """Belongs to the event loop. After `ensure`, and until the caller next awaits, the version is there: a
    request that is submitted at once will find it."""

    def __init__(self, host: AdapterHost, *, most: int) -> None:
        self._host = host
        self._most = most
        self._loaded: OrderedDict[str, None] = OrderedDict()
        """Least recently used first."""
        self._one_at_a_time = asyncio.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    async def ensure(self, version: Version, directory: Path) -> None:
        """Have a version in memory. Raises `AdaptersBusy`, `AdapterUnavailable`."""
        if version.key not in self._loaded:
            async with self._one_at_a_time:
                if version.key not in self._loaded:
                    await self._load(version, directory)
                self._loaded.move_to_end(version.key)
            return
        self._loaded.move_to_end(version.key)

    async def release(self, key: str) -> None:
        """Let a version go; the engine keeps it as long as requests run on it."""
        async with self._one_at_a_time:
            if key in self._loaded:
                del self._loaded[key]
                await self._host.unload_adapter(key)

    async def _load(self, version: Version, directory: Path) -> None:
        while len(self._loaded) >= self._most:
            await self._make_room()
        try:
            if await asyncio.to_thread(digest, directory) != version.sha256:
                raise AdapterInvalid("its files were changed")
            await self._host.load_adapter(version.key, str(directory))
        except (OSError, AdapterInvalid) as error:
            _log.error("adapter_unavailable", adapter=version.id, reason=str(error))
            raise AdapterUnavailable(f"{version.id} cannot be loaded: its files are missing or damaged.") from error
        self._loaded[version.key] = None

    async def _make_room(self) -> None:
        victim = next((key for key in self._loaded if not self._host.adapter_in_use(key)), None)
        if victim is None:
            raise AdaptersBusy(
                f"All {self._most} adapter versions in memory are answering requests, and the setting "
                "adapters.max_loaded allows no more. Try again later."
            )
        del self._loaded[victim]
        await self._host.unload_adapter(victim)
