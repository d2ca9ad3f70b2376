"""How long a step takes: the roofline of a device under a decoder-only model (Williams et al., 2009).

A step reads all weights and the KV of every row's context, and does two operations a parameter and token;
whichever of the two takes longer is its time. Enough to compare schedules, not to predict a machine.

Under tensor parallelism each rank does its share of both, and all meet in two all-reduces a layer, which nothing hides.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """The network between ranks."""

    bandwidth: float
    """Bytes a second that a rank sends, and receives at the same time."""
    latency: float
    """Seconds of an all-reduce of nothing."""


@dataclass(frozen=True)
class Device:
    """What a step is limited by: one device, or the ranks of a model together."""

    flops: float
    """Operations a second that matrix products reach."""
    bandwidth: float
    """Bytes a second that are read from memory."""
    overhead: float
    """Seconds of every step that no work explains: launches, sampling, scheduling."""
    kv_memory: float
    """Bytes for KV blocks beside the weights."""
    ranks: int = 1
    link: Link | None = None
    """None for one rank."""


@dataclass(frozen=True)
class Model:
    """A decoder as far as costs go."""

    parameters: float
    bytes_per_parameter: float
    kv_bytes_per_token: float
    layers: int
    hidden: int

    def communication(self, ranks: int) -> float:
        """Bytes that each rank sends for a token: two all-reduces a layer, of two bytes a value. In a ring each moves
        2 (n - 1) / n of them (Patarasuk and Yuan, 2009)."""
        return 2 * self.layers * 2 * self.hidden * 2 * (ranks - 1) / ranks

    def step_seconds(self, device: Device, num_tokens: int, context: int) -> float:
        """A step of `num_tokens`, whose rows attend to `context` tokens in all."""
        compute = 2 * self.parameters * num_tokens / device.flops
        read = self.parameters * self.bytes_per_parameter + self.kv_bytes_per_token * context
        meeting = 0.0
        if device.link is not None:
            sent = self.communication(device.ranks) * num_tokens
            meeting = 2 * self.layers * device.link.latency + sent / device.link.bandwidth
        return device.overhead + max(compute, read / device.bandwidth) + meeting


def spread(device: Device, model: Model, gpus: int, nodes: int = 1) -> Device:
    """`gpus` such devices on each of `nodes`, which hold one copy of the model together."""
    ranks = gpus * nodes
    if ranks == 1:
        return device
    weights = model.parameters * model.bytes_per_parameter
    return replace(
        device,
        flops=device.flops * ranks,
        bandwidth=device.bandwidth * ranks,
        kv_memory=(device.kv_memory + weights) * ranks - weights,
        ranks=ranks,
        link=NVLINK if nodes == 1 else INFINIBAND,
    )


NVLINK = Link(450e9 * 0.8, 10e-6)
"""Fourth generation, as the H100 data sheet has it: 900 GB/s in both directions together. Latency: an assumption."""
INFINIBAND = Link(50e9 * 0.8, 30e-6)
"""NDR, one port of 400 Gbit/s for each GPU. Latency: an assumption."""


LLAMA_8B = Model(8.03e9, 2, 2 * 32 * 8 * 128 * 2, 32, 4096)
"""Llama 3 8B in bfloat16: 32 layers of 4,096, 8 KV heads of 128 (its config.json)."""

SMOLLM2 = Model(134.5e6, 4, 2 * 30 * 3 * 64 * 4, 30, 576)
"""SmolLM2-135M in float32: 30 layers of 576, 3 KV heads of 64 (its config.json)."""

ARITHMETIC, MEMORY = 0.5, 0.8
"""Shares of a data sheet's peaks that good kernels reach in practice: an assumption, the same for both GPUs."""

DEVICES: dict[str, tuple[Device, Model]] = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 989 teraFLOPS bfloat16 (dense), 3.35 TB/s, 80 GB.
    "h100": (Device(989e12 * ARITHMETIC, 3.35e12 * MEMORY, 1e-3, 56e9), LLAMA_8B),
    # NVIDIA A10 Tensor Core GPU data sheet: 125 teraFLOPS bfloat16 (dense), 600 GB/s, 24 GB.
    "a10": (Device(125e12 * ARITHMETIC, 600e9 * MEMORY, 1e-3, 5e9), LLAMA_8B),
    # Measured by `eft bench offline demo` on two cores: 1,105 prompt tokens a second with --input-len 512
    # --output-len 1, and 25 ms a token with --concurrency 1 --output-len 64.
    "cpu": (Device(3.0e11, 22e9, 1e-3, 1e9), SMOLLM2),
}
"""Name → a device and the model that it is simulated with."""
