"""Architectures: one small file each, found by the `architectures` entry of a `config.json`.

Packages add more through the entry point group `eft.models`; see docs/adding-a-model.md.
"""

from runtime.model.families.family import Family
from runtime.model.families.registry import REGISTRY, find_model, is_native, plugins, supported

__all__ = ["REGISTRY", "Family", "find_model", "is_native", "plugins", "supported"]
