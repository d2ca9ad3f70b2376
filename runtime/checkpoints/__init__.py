"""Opening models: Hugging Face directories, GGUF files, hub ids, and the demo model.

Nothing is ever unpickled. Importing this package imports neither torch nor a file format's library.
"""

from runtime.workers.loading.checkpoint import Checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.resolve import open_checkpoint

__all__ = ["Checkpoint", "ModelLoadError", "open_checkpoint"]
