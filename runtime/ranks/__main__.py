"""`python -m runtime.ranks DESCRIPTOR PARENT`: a rank that process PARENT has started, and drives over a socket."""

import socket
import sys

from runtime.ranks.lifeline import die_with
from runtime.workers.memory import share_one_arena


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    share_one_arena()
    from runtime.ranks.link import Link
    from runtime.ranks.rank import end, follow  # after `die_with`: this imports torch, which takes a while

    end(follow(Link(socket.socket(fileno=descriptor))))


main()
