"""Eft's one process: engine, scheduler, blocks, workers, trainer, API and command line.

`LLM` and `SamplingParams` are the entry point for scripts; they are imported when first used, so that
`import runtime` costs nothing.
"""

from typing import TYPE_CHECKING, Any

from runtime.support.memory import limit_spinning

if TYPE_CHECKING:
    from runtime.llm import LLM, Completion
    from runtime.messages import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]

limit_spinning()

_HOMES = {"LLM": "runtime.llm", "Completion": "runtime.llm", "SamplingParams": "runtime.messages"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
