"""`python -m runtime.workers.parallel DESCRIPTOR PARENT`: a rank that process PARENT has started.

It is driven over a socket.
"""

import socket
import sys

from runtime.support.memory import share_one_arena
from runtime.support.threads import die_with


def main() -> None:
    """Follow the engine's process over an inherited socket, to its end."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    share_one_arena()
    from runtime.workers.parallel.messages import Link
    from runtime.workers.parallel.rank import end, follow  # after `die_with`: this imports torch, which takes a while

    end(follow(Link(socket.socket(fileno=descriptor))))


main()
