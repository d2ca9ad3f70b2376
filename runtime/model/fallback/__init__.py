"""Models without a family of their own: transformers' modules, attending over our paged cache.

transformers looks up its attention functions by name (`ALL_ATTENTION_FUNCTIONS`); one of these names is ours. The
modules see one flat batch as a single sequence with given positions, so a step's rows can be anything, as in our own
decoder. What a model is, and whether it can be served like that, is found out by running it once on a few tokens.
Importing this package imports transformers.
"""

from runtime.workers.fallback.decoder import FallbackDecoder
from runtime.workers.fallback.load import load_fallback, lora_base

__all__ = ["FallbackDecoder", "load_fallback", "lora_base"]
