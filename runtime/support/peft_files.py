"""Names of the two files of an adapter in PEFT's format: for those too that must not import torch."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
