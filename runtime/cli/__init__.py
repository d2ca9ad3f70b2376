"""The command line. One small file per command; nothing here imports torch before a model is loaded."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `eft` with these arguments (default: the process's own) and return the exit code."""
    from runtime.cli.app import run

    return run(argv)
