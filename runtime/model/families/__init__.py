"""Architectures: one small file each, found by the `architectures` entry of a `config.json`.

Packages bring more through the entry point group `eft.models`; see docs/adding-a-model.md.
"""

from runtime.workers.models.family import Family
from runtime.workers.models.registry import REGISTRY, find_model, is_native, plugins, supported

__all__ = ["REGISTRY", "Family", "find_model", "is_native", "plugins", "supported"]
