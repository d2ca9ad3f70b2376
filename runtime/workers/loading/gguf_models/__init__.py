"""GGUF's architectures in Hugging Face's terms: configuration, tensor names, order of rows.

Conventions as in llama.cpp's convert_hf_to_gguf.py, which made the files, undone.
"""

from runtime.workers.loading.gguf_models.families import SUPPORTED, find_family
from runtime.workers.loading.gguf_models.family import GgufFamily
from runtime.workers.loading.gguf_models.rope import ROPE_FACTORS
from runtime.workers.loading.gguf_models.source import Source

__all__ = ["ROPE_FACTORS", "SUPPORTED", "GgufFamily", "Source", "find_family"]
