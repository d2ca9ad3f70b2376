"""Ranks that torchrun has started, on one node or several: `torchrun … -m runtime serve MODEL`.

The process of rank 0 is the server, and starts the rank that computes beside it; those of all others are ranks. They
find the server through torchrun's store, and connect to it. Ranks are numbered node by node, so that neighbours share
a node: a ring of them crosses the network once a node. torchrun alone can start them again (`--max-restarts`).
"""

import hmac
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from runtime.model.config import ModelLoadError
from runtime.support.threads import die_with
from runtime.workers.parallel.launch import LOOPBACK, environment, start_rank
from runtime.workers.parallel.messages import Hello, Link, LinkClosed, encode
from runtime.workers.parallel.rank_group import RankProcess
from settings.schema import ObservabilitySettings, ParallelSettings

ARRIVAL = 300.0
"""Seconds in which all ranks must have found the server."""
GREETING = 5.0
"""Seconds in which a connection must have identified itself."""
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


class RankArrival(Struct, frozen=True):
    """First message of a rank to the server."""

    token: str
    rank: int
    local_rank: int


@dataclass(frozen=True)
class Torchrun:
    """The values that torchrun gives to one of its processes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    run: str
    """Names this start of the group, among all that use the store."""

    @classmethod
    def here(cls, variables: Mapping[str, str] = os.environ) -> "Torchrun | None":
        """None where torchrun did not start this process. Raises `ModelLoadError` for an order of ranks that makes
        no sense for a model that all of them share."""
        if "TORCHELASTIC_RUN_ID" not in variables:
            return None
        number = {name: int(variables[name]) for name in _VARIABLES[:5]}
        local_rank, local_size = number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"]
        if number["RANK"] != number["GROUP_RANK"] * local_size + local_rank:
            raise ModelLoadError("the ranks must be numbered node by node, with as many on every node.")
        if variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ModelLoadError("torchrun must keep the store itself; use --rdzv-backend c10d.")
        return cls(
            rank=number["RANK"],
            size=number["WORLD_SIZE"],
            local_rank=local_rank,
            local_size=local_size,
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
            run=f"eft/{variables['TORCHELASTIC_RUN_ID']}/{variables['TORCHELASTIC_RESTART_COUNT']}",
        )

    def interface(self, settings: ParallelSettings) -> str | None:
        """Network interface for the ranks; None: any that leads to the other ranks."""
        return settings.interface or (LOOPBACK if self.size == self.local_size else None)

    def store(self) -> Any:
        """torchrun's, of bytes by name: `set`, and `get`, which waits for what is not there yet."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        return TCPStore(self.address, self.port, is_master=False, timeout=timedelta(seconds=ARRIVAL))


class TorchrunLauncher:
    """Waits for the ranks that torchrun has started; once."""

    restarts = False

    def __init__(
        self,
        torchrun: Torchrun,
        settings: ParallelSettings,
        *,
        threads: int,
        patience: float,
        observability: ObservabilitySettings,
    ) -> None:
        """As `NodeLauncher`."""
        self.size = torchrun.size
        self.per_node = torchrun.local_size
        self._torchrun = torchrun
        self._interface = torchrun.interface(settings)
        self._threads = threads
        self._patience = patience
        self._observability = observability

    def __call__(self) -> list[RankProcess]:
        """Start this process's own rank, and wait for the others. Raises `ModelLoadError`."""
        torchrun, token = self._torchrun, secrets.token_hex(16)
        kept = {name: os.environ[name] for name in _VARIABLES}
        with socket.create_server((_own_address(self._interface, torchrun.address), 0)) as listener:
            host, port = listener.getsockname()
            torchrun.store().set(torchrun.run, f"{host} {port} {token}")
            own = start_rank(self._hello(0, torchrun.local_rank), environment(self._threads, self._interface) | kept)
            members = {0: own}
            deadline = time.monotonic() + ARRIVAL
            while len(members) < self.size:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    member = self._welcome(listener.accept()[0], token)
                except TimeoutError:
                    missing = sorted(set(range(self.size)) - members.keys())
                    raise ModelLoadError(f"ranks {missing} have not come within {ARRIVAL:g} s.") from None
                if member is not None:
                    members[member.number] = member
        return [members[rank] for rank in range(self.size)]

    def clean(self) -> None:
        return

    def _welcome(self, stream: socket.socket, token: str) -> RankProcess | None:
        """None for a connection from no rank of this group."""
        link, descriptor = Link(stream), stream.fileno()
        try:
            arrival = msgspec.msgpack.decode(link.receive(time.monotonic() + GREETING, most=1024), type=RankArrival)
            if not hmac.compare_digest(arrival.token, token) or not 0 < arrival.rank < self.size:
                raise LinkClosed("a stranger")
            link.send(encode(self._hello(arrival.rank, arrival.local_rank)))
        except (LinkClosed, TimeoutError, msgspec.MsgspecError):
            link.close()
            return None
        return RankProcess(arrival.rank, link, descriptor, None)

    def _hello(self, rank: int, local_rank: int) -> Hello:
        return Hello(
            rank=rank,
            size=self.size,
            local_rank=local_rank,
            store="env://",
            threads=self._threads,
            timeout=self._patience,
            observability=self._observability,
        )


def follow_torchrun(settings: ParallelSettings) -> None:
    """In another process than that of rank 0, be a rank until the server ends, and end the process with it. Raises
    `ModelLoadError`."""
    torchrun = Torchrun.here()
    if torchrun is None or torchrun.rank == 0:
        return
    die_with(os.getppid())
    if (interface := torchrun.interface(settings)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    from runtime.workers.parallel.rank import end, follow

    host, port, token = torchrun.store().get(torchrun.run).decode().split()
    link = Link(socket.create_connection((host, int(port)), timeout=ARRIVAL))
    link.send(encode(RankArrival(token, torchrun.rank, torchrun.local_rank)))
    end(follow(link))


def _own_address(interface: str | None, master: str) -> str:
    """The IPv4 address of an interface, else the address at which the others reach this node."""
    if interface is None:
        return socket.gethostbyname(master)
    for address in psutil.net_if_addrs().get(interface, []):
        if address.family is socket.AF_INET:
            return str(address.address)
    raise ModelLoadError(f"parallel.interface is {interface!r}, which has no IPv4 address here.")
