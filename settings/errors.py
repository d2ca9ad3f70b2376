"""The one error that reading settings raises."""

from collections.abc import Sequence


class SettingsError(Exception):
    """The settings as given cannot be used. Holds every problem found, not just the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
