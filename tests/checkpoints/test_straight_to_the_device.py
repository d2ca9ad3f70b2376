"""Weights go from the file to the device tensor by tensor: the host holds no copy of the model."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from settings.schema import ModelSettings
from tests.tiny import make_tiny_llama

META = torch.device("meta")


class HostMemory(TorchDispatchMode):
    """Bytes of tensors on the CPU that ops have made and that are still there, and their peak. Views and maps of files
    are not made by ops."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_address(one) for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)}
        for one in tree_flatten(found)[0]:
            if isinstance(one, Tensor) and one.device.type == "cpu" and _address(one) not in given:
                self._now += one.nbytes
                self.peak = max(self.peak, self._now)
                weakref.finalize(one, self._gone(one.nbytes))
        return found

    def _gone(self, size: int) -> Callable[[], None]:
        def gone() -> None:
            self._now -= size

        return gone


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else -1


def test_no_copy_of_the_model_on_the_host(tmp_path: Path) -> None:
    """Into a decoder on the device `meta`, which stands for a GPU, in a type that is not the file's."""
    path = make_tiny_llama(tmp_path, num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    settings = ModelSettings(model=str(path), dtype="bfloat16", kernels="reference")
    with HostMemory() as memory:
        decoder = load_decoder(open_checkpoint(str(path)), settings, device=META)
    parameters = decoder.parameters().values()
    assert {parameter.value.device for parameter in parameters if isinstance(parameter.value, Tensor)} == {META}
    sizes = [parameter.num_bytes for parameter in parameters]
    assert sum(sizes) > 2_000_000
    assert memory.peak < sum(sizes) / 50


def test_copies_on_the_host_are_seen() -> None:
    with HostMemory() as memory:
        held = [torch.ones(1000) for _ in range(3)]
        del held[0]
        held.append(torch.zeros(1000))
    assert memory.peak == 12_000
