"""PEFT's own files, `adapter_config.json` and `adapter_model.safetensors`: read and written without PEFT.

Reading trusts nothing: an adapter may come from any source.
"""

from runtime.checkpoints.peft.config import AdapterInvalid
from runtime.checkpoints.peft.files import read_adapter, read_config, read_files, write_adapter
from runtime.support.peft_files import CONFIG, FILES, WEIGHTS

__all__ = ["CONFIG", "FILES", "WEIGHTS", "AdapterInvalid", "read_adapter", "read_config", "read_files", "write_adapter"]
