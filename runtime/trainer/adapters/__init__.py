"""The library of adapters: immutable versions on the disk, names that point to them, and which are in memory."""

from runtime.trainer.adapters.library import AdapterLibrary
from runtime.trainer.adapters.memory import AdapterHost
from runtime.trainer.adapters.records import AdapterRecord, Canary, Version
from runtime.trainer.adapters.store import SCHEMA

__all__ = ["SCHEMA", "AdapterHost", "AdapterLibrary", "AdapterRecord", "Canary", "Version"]
