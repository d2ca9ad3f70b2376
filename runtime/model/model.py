"""Interface of a model for serving and training (our decoder, or transformers' own modules), its device, its cache."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import psutil
import torch
from torch import Tensor

from kernels import Ops, describe
from runtime.model.attention import Attention, KVCache
from runtime.model.config import ModelLoadError
from runtime.model.group import Group
from runtime.model.layers import Linear, Parameter
from runtime.model.lora import Adaptation
from runtime.model.spec import DecoderSpec
from runtime.model.split import Vocabulary
from runtime.support.machine import Gpu, GpuUsage


class Layer(Protocol):
    """A layer as adapters see it: its index and its linears."""

    @property
    def index(self) -> int: ...

    @property
    def linears(self) -> Mapping[str, Linear]: ...


class Model(Protocol):
    """See `runtime.model.decoder.Decoder`, where each of these is described."""

    @property
    def spec(self) -> DecoderSpec: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def max_len(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def group(self) -> Group: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def batch_variance(self) -> str | None: ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        adaptation: Adaptation | None = None,
        *,
        logits_indices: Tensor | None = None,
    ) -> Tensor: ...

    def normed(self, hidden: Tensor) -> Tensor:
        """`hidden` [rows, hidden], rows of the result of `forward` → the same after the last norm."""
        ...

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """`hidden` has rows of the result of `forward`."""
        ...

    def local_logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor: ...

    def parameters(self) -> dict[str, Parameter]: ...


def make_cache(model: Model, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """A KV cache for the model, on `device`: the model's own, or the CPU beside it."""
    return KVCache(
        model.kv_shapes,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
        device=device,
        pinned=device.type == "cpu" and model.device.type == "cuda",
        spare=device.type == "cuda",  # for the padding of recorded steps
    )


def make_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The device for the setting `model.device`. With several GPUs, `local_rank`, a rank's number on its node, picks
    one. Raises `ModelLoadError` for an unknown device, or for CUDA where torch finds none."""
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


def gpus() -> list[Gpu]:
    """GPUs that torch can use, in the order of their numbers."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [Gpu(name=one.name, memory=one.total_memory) for one in found]


def gpu_usage() -> list[GpuUsage]:
    """Use of the GPUs that torch can use. From NVML (package nvidia-ml-py); without it, the memory alone of those that
    this process has tensors on, since the others would get a context by being asked. Blocks for milliseconds."""
    found = []
    for index, gpu in enumerate(gpus()):
        try:
            used, busy = torch.cuda.device_memory_used(index), torch.cuda.utilization(index) / 100
        except (ImportError, RuntimeError):
            if not torch.cuda.memory_reserved(index):
                continue
            free, total = torch.cuda.mem_get_info(index)
            used, busy = total - free, None
        found.append(GpuUsage(index=index, used=used, total=gpu.memory, busy=busy))
    return found


def backend_of(model: Model) -> str | None:
    """Backend of the ops that the model computes with; None where other processes compute."""
    return None if model.device.type == "meta" else describe(model.ops)


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes."""

    free: int
    total: int | None = None
    """Of a GPU, all of it; None for host memory, which is others' too."""


def device_memory(device: torch.device) -> DeviceMemory:
    """Memory of a device, or of the host for any other than a GPU."""
    if device.type != "cuda":
        return DeviceMemory(int(psutil.virtual_memory().available))
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(int(free), int(total))
