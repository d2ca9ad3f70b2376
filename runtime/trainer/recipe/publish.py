"""The gate of a recipe: when a finished job's adapter is published."""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from runtime.trainer.recipe.gate import Gate, GateError, GateMetric, GateUndefined

_WORDS = ("always", "never")


class Publish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gate before publishing."""

    when: Annotated[
        str,
        Meta(
            max_length=200,
            description="`always`, `never`, or a condition on metrics, such as `eval_loss < 1.5` or "
            "`exact_match >= base.exact_match + 0.02`.",
        ),
    ] = "always"

    def problem(self) -> str | None:
        """The fault of `when`, or None."""
        try:
            self._gate()
        except GateError as error:
            return f"expected always, never, or a condition such as `eval_loss < 1.5`, got {self.when!r}; {error}"
        return None

    @property
    def metrics(self) -> tuple[GateMetric, ...]:
        """Metrics that decide; none for a condition that cannot be read."""
        try:
            gate = self._gate()
        except GateError:
            return ()
        return () if gate is None else gate.metrics

    def decide(self, values: Mapping[str, float]) -> tuple[bool, str]:
        """True if a run that ended with these metrics is published, and the reason. `values`: by `GateMetric.key`.
        A metric that is missing or NaN forbids it."""
        gate = self._gate()
        if gate is None:
            return self.when == "always", f"publish.when is {self.when}"
        found = [f"{metric} is {_shown(values.get(metric.key))}" for metric in gate.metrics]
        text = f"publish.when is {self.when!r}, and " + ", ".join(found or ["it names no metric"])
        try:
            return gate.allows(values), text
        except GateUndefined:
            return False, text

    def _gate(self) -> Gate | None:
        return None if self.when in _WORDS else Gate(self.when)


def _shown(value: float | None) -> str:
    return "not known" if value is None else f"{value:.6g}"
