"""How a command ends other than well. The exit code sits on the class."""

from typing import ClassVar


class CommandError(Exception):
    """What was asked for could not be done."""

    exit_code: ClassVar[int] = 1


class UsageError(CommandError):
    """What was asked for makes no sense: flags, files, settings."""

    exit_code = 2
