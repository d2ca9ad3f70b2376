"""Starting all ranks of one node as children of this process."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.workers.parallel.messages import Hello, Link, encode
from runtime.workers.parallel.rank_group import RankProcess
from settings.schema import ObservabilitySettings

LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"

_KEPT = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "CXX",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "EFT_FAILPOINTS", "EFT_CACHE_DIR", "EFT_KERNELS_VARIANT",
)  # fmt: skip
_KEPT_BEGINNINGS = ("XDG_", "HF_", "NCCL_", "GLOO_")
"""Environment variables that ranks get. Keys are left out, and so are settings, which ranks get in messages."""


class NodeLauncher:
    """Ranks that meet through a file, and talk over the loopback interface, or one that is named."""

    restarts = True

    def __init__(
        self, size: int, *, threads: int, interface: str | None, patience: float, observability: ObservabilitySettings
    ) -> None:
        """`threads` are each rank's; `patience` is how long a rank waits for others before it ends by itself."""
        self.size = self.per_node = size
        self._threads = threads
        self._interface = interface or LOOPBACK
        self._patience = patience
        self._observability = observability
        self._folder: Path | None = None

    def __call__(self) -> list[RankProcess]:
        self.clean()
        self._folder = Path(tempfile.mkdtemp(prefix="eft-ranks-"))
        return [self._member(rank, self._folder / "store") for rank in range(self.size)]

    def clean(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _member(self, rank: int, store: Path) -> RankProcess:
        hello = Hello(
            rank=rank,
            size=self.size,
            local_rank=rank,
            store=f"file://{store}",
            threads=self._threads,
            timeout=self._patience,
            observability=self._observability,
        )
        return start_rank(hello, environment(self._threads, self._interface))


def start_rank(hello: Hello, environment: dict[str, str]) -> RankProcess:
    """A rank as a child of the calling thread, greeted."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.workers.parallel", str(theirs.fileno()), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # ours is for what a command prints
            pass_fds=[theirs.fileno()],
        )
    link = Link(ours)
    link.send(encode(hello))
    return RankProcess(hello.rank, link, ours.fileno(), process)


def environment(threads: int, interface: str | None) -> dict[str, str]:
    """Environment variables of a rank that computes on `threads` threads and reaches the others over `interface`, if
    given."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_BEGINNINGS)}
    here = str(Path(__file__).parents[3])
    paths = [here, *filter(None, [kept.get("PYTHONPATH")])]
    named = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return kept | named | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
