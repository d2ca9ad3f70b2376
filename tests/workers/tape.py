"""A stand-in for CUDA graphs on the CPU, as strict as they are: it repeats what was launched, not what was called.

Recording notes every op of torch and every launch of a Triton kernel, with the numbers and addresses that they were
given. Replaying runs these alone, so a number of the host that differs from step to step shows as a wrong result. What
recording on a GPU forbids, raises: reads by the host, shapes that depend on values, and tensors made of the host's
numbers. Tensors from outside are found by their addresses, and must still be there.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import InterpretedFunction

from runtime.workers.cuda_graphs import Work

FORBIDDEN_OPS = {
    "aten::_local_scalar_dense": "the host reads a number",
    "aten::item": "the host reads a number",
    "aten::equal": "the host reads a number",
    "aten::is_nonzero": "the host reads a number",
    "aten::nonzero": "a shape depends on values",
    "aten::masked_select": "a shape depends on values",
    "aten::bincount": "a shape depends on values",
    "aten::_unique2": "a shape depends on values",
    "aten::repeat_interleave": "a shape depends on values",
    "aten::lift_fresh": "a tensor is made of the host's numbers",
}
HOST_READS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


class NotRecordable(Exception):
    """Something that cannot be in a CUDA graph."""


class HostReads(TorchFunctionMode):
    """Calls `on_read` with the name of each method through which the host waits for a tensor."""

    def __init__(self, on_read: Callable[[str], None]) -> None:
        super().__init__()
        self._on_read = on_read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            self._on_read(name)
        return func(*args, **(kwargs or {}))


class TapeRecorder:
    """`Recorder` for tests. Counts its recordings, and forgets the result of its last replay."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, work: Work) -> Work:
        work()  # as on a GPU, where it compiles the kernels
        tape = Tape()
        with tape.recording():
            found = work()
        self.recordings += 1

        def replay() -> Tensor:
            self.replays += 1
            tape.replay()
            return found

        return replay


class Tape(TorchDispatchMode):
    """Ops and launches in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._own: dict[int, Tensor] = {}
        """Address of each storage that was allocated while recording → a tensor in it, which keeps it."""
        self._outside: dict[int, StorageWeakRef] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            given, named = self._references((args, kwargs))

            def again() -> None:
                run(kernel, *given, grid=grid, warmup=warmup, **named)

            self._calls.append(again)
            with _disable_current_modes():
                again()

        with patch.object(InterpretedFunction, "run", launch), HostReads(_refuse), self:
            yield

    def replay(self) -> None:
        for address, storage in self._outside.items():
            if storage.expired():
                raise NotRecordable(f"what was at {address:#x} when it was recorded is gone")
        for call in self._calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args)
        found = func(*args, **kwargs)
        outputs = [one for one in tree_flatten(found)[0] if isinstance(one, Tensor)]
        inputs = {_address(one) for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)}
        given, named = self._references((args, kwargs))
        fresh = [None if _address(one) in inputs else one for one in outputs]
        for one in fresh:
            if one is not None:
                self._own[_address(one)] = one
        if func._schema.is_mutable or any(one is not None for one in fresh):  # a view is there for good
            self._calls.append(lambda: _again(func, given, named, fresh))
        return found

    def _references(self, arguments: Any) -> Any:
        return tree_map(lambda one: self._reference(one) if isinstance(one, Tensor) else one, arguments)

    def _reference(self, tensor: Tensor) -> Tensor:
        """A tensor at the same address; of a storage from outside it does not keep that."""
        with _disable_current_modes():
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._own or not storage.nbytes():
                return tensor.detach()
            self._outside.setdefault(storage.data_ptr(), StorageWeakRef(storage))
            memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
            flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
            return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _again(func: Any, args: Any, kwargs: Any, recorded: list[Tensor | None]) -> None:
    found = [one for one in tree_flatten(func(*args, **kwargs))[0] if isinstance(one, Tensor)]
    for old, new in zip(recorded, found, strict=True):
        if old is not None:
            assert old.shape == new.shape, f"{func} has another shape now"
            old.copy_(new)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse(name: str) -> None:
    raise NotRecordable(f"the host reads a tensor: {name}")


def _check(func: Any, args: Any) -> None:
    if reason := FORBIDDEN_OPS.get(func._schema.name):
        raise NotRecordable(f"{reason}: {func}")
    by_index = func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_")
    if by_index and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]):
        raise NotRecordable(f"a shape depends on values: {func} by a mask")
