"""Whether flash-attn is used, and for what: with these settings it may read the KV cache, or not."""

import importlib

from runtime.cli.findings import Finding
from settings.load import SettingsError, load
from settings.schema import Settings

AREA = "software"


def find() -> list[Finding]:
    try:
        flash = importlib.import_module("kernels.triton.flash")
        reason: str | None = flash.unavailable()
        block: int = flash.BLOCK
    except Exception as error:  # then there are no kernels, which is said elsewhere
        return [Finding(AREA, "flash-attn", f"not used: {type(error).__name__}: {error}")]
    if reason is not None:
        return [Finding(AREA, "flash-attn", f"not used: {reason}")]
    try:
        settings = load().settings
    except SettingsError:  # these are named elsewhere
        settings = Settings()
    if (obstacle := _unread(settings, block)) is not None:
        return [Finding(AREA, "flash-attn", f"used in training; prompts are left to Triton, as {obstacle}")]
    return [Finding(AREA, "flash-attn", "used for prompts and in training")]


def _unread(settings: Settings, block: int) -> str | None:
    """Why it cannot read the cache that the settings ask for."""
    cache = settings.cache
    if cache.block_size % block:
        return f"cache.block_size is {cache.block_size}, and it reads multiples of {block}"
    stored = settings.model.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    if stored in ("float32", "int8"):
        return f"the cache holds {stored}, and it reads bfloat16"
    return None
