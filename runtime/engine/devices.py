"""Devices that are set aside for jobs in processes of their own (`trainer.devices`)."""

import os

import torch
from msgspec import Struct

from runtime.model.config import ModelLoadError
from settings.schema import Settings


class TrainingDevices(Struct, frozen=True, kw_only=True):
    """The devices of the setting `trainer.devices`, on one node."""

    kind: str
    """cpu or cuda"""
    indices: tuple[int, ...]
    """Numbers of the GPUs, as this process counts them; of CPU ranks 0, 1, …"""

    def visible(self, count: int) -> dict[str, str]:
        """Environment in which the first `count` are all that there is."""
        if self.kind == "cpu":
            return {"CUDA_VISIBLE_DEVICES": ""}
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = known.split(",") if known else [str(number) for number in range(max(self.indices) + 1)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[index] for index in self.indices[:count])}


def training_devices(settings: Settings) -> TrainingDevices | None:
    """The devices that are set aside for jobs; None where there are none. Raises `ModelLoadError` for such as serve, or
    are not there."""
    given = settings.trainer.devices
    if not given:
        return None
    if set(given) == {"cpu"}:
        return TrainingDevices(kind="cpu", indices=tuple(range(len(given))))
    indices = []
    for name in given:
        kind, _, number = name.partition(":")
        if kind != "cuda" or not number.isdecimal():
            raise ModelLoadError(f"trainer.devices has {name!r}: expected cuda:N for each GPU, or cpu for each rank.")
        indices.append(int(number))
    _check_gpus(settings, indices)
    return TrainingDevices(kind="cuda", indices=tuple(indices))


def _check_gpus(settings: Settings, indices: list[int]) -> None:
    if len(set(indices)) < len(indices):
        raise ModelLoadError(f"trainer.devices names a GPU twice: {', '.join(settings.trainer.devices)}.")
    available = torch.cuda.device_count()
    if missing := [index for index in indices if index >= available]:
        raise ModelLoadError(f"trainer.devices has cuda:{missing[0]}, and this machine has {available} GPUs.")
    serving = settings.model.device
    first = int(serving.partition(":")[2] or 0)
    used = range(first, first + (settings.parallel.tp or 1)) if serving != "cpu" else range(0)
    if shared := [index for index in indices if index in used]:
        raise ModelLoadError(
            f"trainer.devices has cuda:{shared[0]}, which serves the model: name GPUs that do not, or set model.device."
        )
