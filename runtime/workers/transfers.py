"""Copies between the host and the device that do not stop either: through pinned memory, in the order of the stream."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Transfers:
    """Copies to and from one device. Pinned memory comes from torch's allocator, which gives a piece out again only
    when the copies from and to it are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"

    def put(self, values: np.ndarray, target: Tensor) -> None:
        """Copy to a tensor of the same shape and type on the device. `values` may change at once."""
        staged = torch.empty(values.shape, dtype=target.dtype, pin_memory=self._pinned)
        staged.numpy()[...] = values
        target.copy_(staged, non_blocking=True)

    def new(self, values: np.ndarray) -> Tensor:
        """The values in a new tensor on the device."""
        target = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=self._device)
        self.put(values, target)
        return target

    def get(self, source: Tensor) -> Callable[[], np.ndarray]:
        """Begin a copy to the host; calling the result waits for it alone, not for work that was launched later."""
        if not self._pinned:
            copied = source.clone()
            return copied.numpy
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> np.ndarray:
            arrived.synchronize()
            return host.numpy()

        return wait
