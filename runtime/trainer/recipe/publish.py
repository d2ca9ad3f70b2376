"""The gate of a recipe: when a finished job's adapter is published."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Annotated

from msgspec import Meta, Struct

METRICS = ("eval_loss", "eval_accuracy", "train_loss", "train_accuracy")
REWARDS = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
"""Metrics of preferences; each alone is that of the evaluation, and with `eval_` or `train_` before it either."""
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*([\w/]+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*")


class Publish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gate before publishing."""

    when: Annotated[
        str,
        Meta(
            max_length=200,
            description="`always`, `never`, or a metric, a comparison and a number, such as `eval_loss < 1.5`, or of "
            "preferences `rewards/margins > 0.5`.",
        ),
    ] = "always"

    @property
    def metric(self) -> str | None:
        """The metric that decides, or None."""
        match = _CONDITION.fullmatch(self.when)
        if match is None:
            return None
        return f"eval_{match[1]}" if match[1] in REWARDS else match[1]

    @property
    def rewards(self) -> bool:
        """True if the metric is one of preferences."""
        return self.metric is not None and self.metric.partition("_")[2] in REWARDS

    def problem(self) -> str | None:
        """The fault of `when`, or None."""
        if self.when in ("always", "never") or self.metric in METRICS or self.rewards:
            return None
        return (
            f"expected always, never, or a condition such as `eval_loss < 1.5` on one of {', '.join(METRICS)}, or with "
            f"rl on one of {', '.join(REWARDS)}, "
            f"got {self.when!r}"
        )

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """True if a run that ended with these metrics is published. A metric that is missing or NaN forbids it."""
        match = _CONDITION.fullmatch(self.when)
        if match is None:
            return self.when == "always"
        _, comparison, limit = match.groups()
        value = metrics.get(self.metric or "")
        return value is not None and _COMPARE[comparison](value, float(limit))
