"""Where the commands print their tables."""

import sys

from rich.console import Console

_UNBROKEN = 4096
"""Columns, where no terminal has a width: a row of a table is then one line."""


def console() -> Console:
    """Standard output. As wide as the terminal; piped, wide enough that nothing is wrapped."""
    width = None if sys.stdout.isatty() else _UNBROKEN
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)
