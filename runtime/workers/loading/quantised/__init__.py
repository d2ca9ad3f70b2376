"""Checkpoints of Hugging Face directories whose linears are stored in integers: GPTQ, AWQ, bitsandbytes.

Each linear is several tensors; a scheme knows which, and makes one weight of them: in our own integers where they say
the same, and else in floating point.
"""

from runtime.workers.loading.quantised.scheme import Scheme, find_scheme, weights

__all__ = ["Scheme", "find_scheme", "weights"]
