"""GGUF's architectures in Hugging Face's terms: configuration, tensor names, order of rows.

The conversions of llama.cpp's convert_hf_to_gguf.py, which made the files, are undone.
"""

from runtime.checkpoints.gguf.families.families import SUPPORTED, find_family
from runtime.checkpoints.gguf.families.family import ROPE_FACTORS, GgufFamily, GgufSource

__all__ = ["ROPE_FACTORS", "SUPPORTED", "GgufFamily", "GgufSource", "find_family"]
