"""A library over a host that applies nothing, for one base model: the tiny Llama."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.adapters.library import AdapterLibrary
from runtime.adapters.store import SCHEMA
from runtime.checkpoints.peft import read_adapter
from runtime.metrics import CacheShape, Metrics
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from runtime.support.database import Database
from tests.adapter_files import make_adapter
from tests.parity.llama import load


class FakeHost:
    """Reads adapters as the engine does, with a place for each, and remembers which may be named and which are
    loaded."""

    model_name = "base-model"

    def __init__(self, base: LoraBase) -> None:
        self.lora_base = base
        self.metrics = Metrics("m", vllm_names=False, shape=CacheShape(max_model_len=64, block_size=16, num_blocks=4))
        self.named: dict[str, Callable[[], str]] = {}
        self.loaded: list[str] = []
        self.used: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def add_adapter(self, key: str, files: Callable[[], str]) -> None:
        files()
        await self.gate.wait()
        self.named[key] = files

    async def warm_adapter(self, key: str) -> None:
        read_adapter(Path(self.named[key]()), self.lora_base, max_rank=64)
        await self.gate.wait()
        if key not in self.loaded:
            self.loaded.append(key)

    async def unload_adapter(self, key: str) -> None:
        del self.named[key]
        if key in self.loaded:
            self.loaded.remove(key)

    def adapter_loaded(self, key: str) -> bool:
        return key in self.loaded

    def adapter_in_use(self, key: str) -> bool:
        return key in self.used


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path) -> LoraBase:
    return LoraBase.of(load(tiny_model)[0], Llama, "base-model")


@pytest.fixture(scope="session")
def sources(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different adapters. Read only."""
    folder = tmp_path_factory.mktemp("sources")
    return [make_adapter(tiny_model, folder / str(seed), seed=seed, target_modules=["q_proj"]) for seed in (1, 2, 3)]


Body = Callable[[AdapterLibrary, FakeHost], Awaitable[Any]]


def with_library(directory: Path, base: LoraBase, body: Body, *, max_loaded: int = 4) -> Any:
    """Open a state directory as a server does at its start, run `body`, and close it."""

    async def main() -> Any:
        database = Database(directory, [SCHEMA])
        host = FakeHost(base)
        try:
            library = await AdapterLibrary.open(database, directory, host, max_loaded=max_loaded, max_rank=64)
            result = await body(library, host)
            await library.close()
            return result
        finally:
            database.close()

    return asyncio.run(main())
