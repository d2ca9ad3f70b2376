"""Which device a model computes on: decided here, and handed on from whoever asked."""

import torch

from runtime.workers.loading.errors import ModelLoadError


def make_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The device that the settings mean; of several GPUs that of a node's rank of this number. Raises
    `ModelLoadError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"model.device is {name!r}, but torch finds no CUDA device here.")
    return device
