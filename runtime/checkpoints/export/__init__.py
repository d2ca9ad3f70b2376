"""An adapter written for other programs: merged into its base as a model directory or a GGUF file, or alone."""

from runtime.checkpoints.export.export import FORMATS, Exported, check_format, export_adapter

__all__ = ["FORMATS", "Exported", "check_format", "export_adapter"]
