"""The ranks of a launched job: who they are, and messages that all of them exchange."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = 16 * 1024
"""Room of a rank's message, its length included."""
_LENGTH_BYTES = 4


class Ranks:
    """This process among all of them, by the environment that torchrun makes."""

    def __init__(self, kind: str, timeout: float) -> None:
        """Meet the others. `kind`: cpu or cuda; `timeout`: seconds that one waits for the others."""
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        if kind == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        dist.destroy_process_group()

    def exchange(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, by rank. All ranks at once. Raises `ValueError` for one that is too long."""
        if len(message) > MESSAGE_BYTES - _LENGTH_BYTES:
            raise ValueError(f"a message of {len(message)} bytes has no room in {MESSAGE_BYTES}")
        data = len(message).to_bytes(_LENGTH_BYTES, "little") + message
        padded = bytearray(data.ljust(MESSAGE_BYTES, b"\0"))
        own = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [_unpack(one) for one in found]

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Sums of the values over all ranks, in float64. All ranks at once."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, count: int) -> tuple[list[int], int]:
        """This rank's of `count` pieces of work, and the most that a rank has: all ranks do that many."""
        return list(range(self.rank, count, self.size)), -(-count // self.size)


def _unpack(data: Tensor) -> bytes:
    raw = bytes(data.cpu().tolist())
    return raw[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")]
