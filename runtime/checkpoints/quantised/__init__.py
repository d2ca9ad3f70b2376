"""Checkpoints of Hugging Face directories whose linears are stored in integers: GPTQ, AWQ, bitsandbytes.

Each linear is several tensors. A scheme lists them and makes one weight of them: in our own integers where these
represent the same values, and else in floating point.
"""

from runtime.checkpoints.quantised.scheme import Scheme, weights
from runtime.model.config import Config, ModelLoadError

__all__ = ["Scheme", "find_scheme", "weights"]


def find_scheme(config: Config) -> Scheme | None:
    """The scheme of a model's config.json; None: floating point. Raises `ModelLoadError` naming what is supported."""
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise ModelLoadError(f"quantization_config must be an object, got {type(given).__name__}.")
    # Imported where they are used: each needs torch.
    from runtime.checkpoints.quantised import bitsandbytes, four_bits

    schemes = {"gptq": four_bits.gptq, "awq": four_bits.awq, "bitsandbytes": bitsandbytes.scheme}
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in schemes:
        raise ModelLoadError(
            f"Weights quantised with {method!r} cannot be loaded; supported are: {', '.join(schemes)}, the float32, "
            "float16 and bfloat16 checkpoints of a model, and GGUF files."
        )
    try:
        return schemes[method](given)
    except ValueError as error:
        raise ModelLoadError(f"quantization_config: {error}.") from None
