"""PEFT's own files, `adapter_config.json` and `adapter_model.safetensors`: read and written without PEFT.

Reading trusts nothing: an adapter may come from anywhere.
"""

from runtime.workers.loading.peft.errors import AdapterInvalid
from runtime.workers.loading.peft.names import CONFIG, FILES, WEIGHTS
from runtime.workers.loading.peft.reader import read_adapter, read_files
from runtime.workers.loading.peft.writer import write_adapter

__all__ = ["CONFIG", "FILES", "WEIGHTS", "AdapterInvalid", "read_adapter", "read_files", "write_adapter"]
