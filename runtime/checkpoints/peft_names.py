"""Names of the two files of an adapter in PEFT's format. Beside `peft`, which imports torch: the API must not."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
