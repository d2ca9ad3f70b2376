"""An adapter written for other programs: merged into its base as a model directory or a GGUF file, or alone.

`export.export_adapter` writes it; here is what needs no torch: the formats and their types.
"""

from runtime.checkpoints.gguf.writing import TYPES
from runtime.errors import InvalidRequest

FORMATS = ("merged", "peft", "gguf", "gguf-lora")
DTYPES = ("float32", "float16", "bfloat16")
"""Types of a merged directory."""


def check_format(format: str, type: str | None) -> None:
    """Raise `InvalidRequest` for a format, or a type that the format does not have."""
    if format not in FORMATS:
        raise InvalidRequest(f"format: expected one of {', '.join(FORMATS)}, got `{format[:50]}`.", param="format")
    types = {"merged": DTYPES, "gguf": tuple(TYPES)}.get(format, ())
    if type is not None and type not in types:
        there = f"expected one of {', '.join(types)}" if types else f"{format} is always in its own type"
        raise InvalidRequest(f"type: {there}, got `{type[:50]}`.", param="type")
