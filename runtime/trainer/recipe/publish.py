"""When a finished job's adapter is published."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Annotated

from msgspec import Meta, Struct

METRICS = ("eval_loss", "eval_accuracy", "train_loss", "train_accuracy")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*")


class Publish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gate before publishing."""

    when: Annotated[
        str,
        Meta(
            max_length=200,
            description="`always`, `never`, or a metric, a comparison and a number, such as `eval_loss < 1.5`.",
        ),
    ] = "always"

    @property
    def metric(self) -> str | None:
        """The metric that decides, or None."""
        match = _CONDITION.fullmatch(self.when)
        return match[1] if match else None

    def problem(self) -> str | None:
        """What is wrong with `when`, or None."""
        if self.when in ("always", "never") or self.metric in METRICS:
            return None
        return (
            f"expected always, never, or a condition such as `eval_loss < 1.5` on one of {', '.join(METRICS)}, "
            f"got {self.when!r}"
        )

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """Whether a run that ended with these metrics is published. A metric that is missing or NaN forbids it."""
        match = _CONDITION.fullmatch(self.when)
        if match is None:
            return self.when == "always"
        name, comparison, limit = match.groups()
        return name in metrics and _COMPARE[comparison](metrics[name], float(limit))
