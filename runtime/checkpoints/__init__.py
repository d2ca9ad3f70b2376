"""Opening models: Hugging Face directories, GGUF files, hub ids, and the demo model.

Nothing is ever unpickled. Importing this package imports neither torch nor a file format's library.
"""

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.resolve import open_checkpoint
from runtime.model.config import ModelLoadError

__all__ = ["Checkpoint", "ModelLoadError", "open_checkpoint"]
