"""Peers in environments of their own, and Eft as they are: each started, measured alone, and ended."""

from benchmarks.peers.eft import Eft
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peer import Driver, Installed, Peer, PeerFailed, Size

__all__ = ["PEERS", "Driver", "Eft", "Installed", "Peer", "PeerFailed", "Size"]


PEERS: dict[str, type[LlamaCpp]] = {kind.name: kind for kind in (LlamaCpp,)}
"""Those that can be named on the command line."""
