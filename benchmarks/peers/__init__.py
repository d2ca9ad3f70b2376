"""Peers in environments of their own, and Eft as they are: each started, measured alone, and ended."""

from benchmarks.peers.eft import Eft
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Driver, Installed, Peer, PeerFailed, Size
from benchmarks.peers.vllm import Vllm

__all__ = ["PEERS", "Driver", "Eft", "Installed", "Peer", "PeerFailed", "Size"]


PEERS: dict[str, type[LlamaCpp] | type[OpenVino] | type[Vllm]] = {
    kind.name: kind for kind in (LlamaCpp, OpenVino, Vllm)
}
"""Those that can be named on the command line."""
