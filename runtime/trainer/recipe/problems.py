"""What is wrong with a recipe: every problem found, each with its key and line."""

from collections.abc import Sequence

from msgspec import Struct

from runtime.errors import InvalidRequest

SHOWN = 50
"""Most problems that one message lists."""


class Problem(Struct, frozen=True):
    """One thing that is wrong."""

    key: str
    """Path of the key, as in `datasets[0].type`; empty when it is the whole file."""
    message: str
    line: int | None = None
    """From 1; None when the recipe did not come as text, or the key is not in it."""

    def __str__(self) -> str:
        place = ", ".join(filter(None, [self.key, f"line {self.line}" if self.line else ""]))
        return f"{place}: {self.message}" if place else self.message


class RecipeError(InvalidRequest):
    """The recipe cannot be used as it is. `problems` has all that was found; `param` is the first one's key."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"… and {len(self.problems) - SHOWN} more")
        head = "" if len(lines) == 1 else f"The recipe has {len(self.problems)} problems:\n"
        super().__init__(head + "\n".join(lines), param=self.problems[0].key or "recipe", code="invalid_recipe")
