"""Models without a family of their own: transformers' modules, attending over our paged cache.

transformers looks up its attention functions by name (`ALL_ATTENTION_FUNCTIONS`); one of these names is ours. The
modules get one flat batch as a single sequence with given positions, so the rows of a step are unrestricted, as in our
own decoder. A probe runs the model once on a few tokens to find its structure, and to check that it can be served this
way. Importing this package imports transformers.
"""

from runtime.model.fallback.decoder import FallbackDecoder
from runtime.model.fallback.load import load_fallback, lora_base

__all__ = ["FallbackDecoder", "load_fallback", "lora_base"]
