"""Whether a token's logits are the same bits whatever the batch, the chunks of its prompt and the number of threads.

The C++ ops promise it, for weights of every type, and with adapters. Where a model needs an op of torch's that
does not, this says so.
"""

from kernels.cpu import CpuOps
from runtime.workers.decoder import Decoder
from runtime.workers.model import Model


def obstacle(decoder: Model) -> str | None:
    """What stands in the way; None: nothing."""
    if not isinstance(decoder, Decoder):
        return "it runs in transformers"
    if not isinstance(decoder.ops, CpuOps):
        return f"the {decoder.ops.name} kernels do not promise it, only those for the CPU in C++ do"
    if decoder.device.type != "cpu" or decoder.dtype.itemsize != 4:
        return "it is promised on the CPU only, with weights that are computed with in float32"
    if decoder.spec.experts is not None:
        return "mixtures of experts group tokens by expert"
    return None
