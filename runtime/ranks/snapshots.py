"""Snapshots of training as bytes, to go from a rank to the engine's process and back."""

from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from runtime.ranks.messages import Tensors
from runtime.trainer.snapshot import Restored, Snapshot


def pack(snapshot: Snapshot | Restored) -> Tensors:
    """A snapshot as bytes."""
    return Tensors(
        progress=snapshot.progress,
        parameters=_file(snapshot.parameters),
        optimizer=_file(snapshot.optimizer),
        best=None if snapshot.best is None else _file(snapshot.best),
    )


def unpack(tensors: Tensors) -> Restored:
    """The snapshot of what `pack` gave."""
    return Restored(
        progress=tensors.progress,
        parameters=load(tensors.parameters),
        optimizer=load(tensors.optimizer),
        best=None if tensors.best is None else load(tensors.best),
    )


def _file(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
