"""The gate of a recipe, when a finished job's adapter is published, and the metrics that it may ask for.

Conditions on metrics, such as `exact_match >= base.exact_match + 0.02 and eval_loss < 1.5`, have numbers, metrics,
`+ - * /`, comparisons, `and`, `or`, `not` and parentheses, with Python's precedence. Nothing is evaluated as code.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

# -- metrics ---------------------------------------------------------------------------------------
#
# Names of the metrics of evaluations: those of the loss, of preferences, and of generated answers.

OF_LOSS: Mapping[str, bool] = {"loss": False, "accuracy": True, "perplexity": False}
"""Metric of every evaluation → True where higher is better. Perplexity is that of supervised training."""

REWARDS: Mapping[str, bool] = {
    "rewards/margins": True,
    "rewards/accuracies": True,
    "rewards/chosen": True,
    "rewards/rejected": False,
}
"""The same of preferences."""

GENERATED: Mapping[str, bool] = {
    "exact_match": True,
    "token_f1": True,
    "bleu": True,
    "chrf": True,
    "ter": False,
    "rouge_l": True,
    "regex": True,
    "json_valid": True,
    "tool_call": True,
}
"""The same of generated answers. An operator's scorers come beside them; for those, higher is better."""

PACKAGES: Mapping[str, str] = {"bleu": "sacrebleu", "chrf": "sacrebleu", "ter": "sacrebleu", "rouge_l": "rouge_score"}
"""Metric → the module that computes it, of the extra `evaluation`."""

OTHER_NAMES: Mapping[str, str] = {"sacrebleu": "bleu"}
"""Axolotl's name of a metric → ours."""

DEFAULT_GENERATED = ("exact_match", "token_f1")
"""Metrics of a recipe that generates answers and names none."""


def plain_metric(name: str) -> str:
    """A metric's name without `eval_`, in our spelling."""
    plain = name.removeprefix("eval_")
    return OTHER_NAMES.get(plain, plain)


def scorer_name(function: str) -> str:
    """Metric of an operator's scorer: the last part of `module:function`."""
    return function.rpartition(":")[2].rpartition(".")[2]


def higher_is_better(name: str) -> bool:
    """Direction of a metric, by its plain name."""
    return {**OF_LOSS, **REWARDS, **GENERATED}.get(name, True)


# -- conditions ------------------------------------------------------------------------------------

MAX_DEPTH = 20
"""Deepest nesting of parentheses and signs."""

Values = Mapping[str, float]
GateScope = Literal["eval", "train", "base"]
Kind = Literal["number", "condition"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>(?:base\.)?[A-Za-z_]\w*(?:/[A-Za-z_]\w*)?)"
    r"|(?P<sign><=|>=|==|!=|[-+*/()<>])|(?P<end>$))"
)
"""A name may hold one `/` before a letter: `rewards/margins`."""
_NAME_PARTS = re.compile(r"(?:(?P<base>base\.)(?:eval_)?|(?P<train>train_)|(?:eval_)?)(?P<metric>.+)")


class GateError(ValueError):
    """A condition that cannot be read, with the place."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(f"at character {position + 1}: {message}")


class GateUndefined(Exception):
    """The condition has no value with these metrics."""


class GateMetric(NamedTuple):
    """A metric that a condition names: of the evaluation, of training, or of the model before the first step."""

    scope: GateScope
    metric: str

    @classmethod
    def of(cls, name: str) -> "GateMetric":
        """`eval_loss`, `loss`, `train_loss`, `base.loss` or `base.eval_loss`."""
        match = _NAME_PARTS.fullmatch(name)
        assert match is not None
        scope: GateScope = "base" if match["base"] else "train" if match["train"] else "eval"
        return cls(scope, plain_metric(match["metric"]))

    @property
    def key(self) -> str:
        """Name among the values that a condition is evaluated with."""
        return f"{self.scope}_{self.metric}"

    def __str__(self) -> str:
        return f"base.{self.metric}" if self.scope == "base" else self.key


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


class _Part(NamedTuple):
    """A part of a condition: its kind, and what it comes to."""

    kind: Kind
    value: Callable[[Values], float]
    position: int


class Gate:
    """A condition that was read."""

    def __init__(self, text: str) -> None:
        """Raises `GateError`."""
        self.metrics: tuple[GateMetric, ...]
        """Metrics that it names, in their order, each once."""
        parser = _Parser(text)
        self._part = parser.whole()
        self.metrics = tuple(dict.fromkeys(parser.metrics))

    def allows(self, values: Values) -> bool:
        """True if the condition holds. Raises `GateUndefined` where a metric is missing or not a number, or a divisor
        is zero."""
        return bool(self._part.value(values))


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str) -> None:
        self.metrics: list[GateMetric] = []
        self._tokens = list(_tokens(text))
        self._at = 0
        self._depth = 0

    def whole(self) -> _Part:
        part = self._condition(self._either())
        if self._next.kind != "end":
            raise self._unexpected("`and`, `or`, or the end")
        return part

    def _either(self) -> _Part:
        left = self._all()
        while self._next.text == "or":
            one = self._condition(left)
            self._advance()
            other = self._condition(self._all())
            left = _Part("condition", _either_of(one.value, other.value), one.position)
        return left

    def _all(self) -> _Part:
        left = self._inverted()
        while self._next.text == "and":
            one = self._condition(left)
            self._advance()
            other = self._condition(self._inverted())
            left = _Part("condition", _both_of(one.value, other.value), one.position)
        return left

    def _inverted(self) -> _Part:
        start = self._next.position
        if not self._take("not"):
            return self._comparison()
        self._deeper()
        inner = self._condition(self._inverted()).value
        self._depth -= 1
        return _Part("condition", lambda values: not inner(values), start)

    def _comparison(self) -> _Part:
        left = self._sum()
        if self._next.text not in _COMPARE:
            return left
        compare = _COMPARE[self._advance().text]
        one, other = self._number(left).value, self._number(self._sum()).value
        if self._next.text in _COMPARE:
            raise GateError(self._next.position, "a comparison has two sides; join two comparisons with `and`")
        return _Part("condition", lambda values: compare(one(values), other(values)), left.position)

    def _sum(self) -> _Part:
        return self._chain(self._product, "+-")

    def _product(self) -> _Part:
        return self._chain(self._signed, "*/")

    def _chain(self, operand: Callable[[], _Part], signs: str) -> _Part:
        left = operand()
        while self._next.kind == "sign" and self._next.text in signs:
            function = _ARITHMETIC[self._advance().text]
            one, other = self._number(left).value, self._number(operand()).value
            left = _Part("number", _applied(function, one, other), left.position)
        return left

    def _signed(self) -> _Part:
        start = self._next.position
        if not self._take("-"):
            return self._atom()
        self._deeper()
        inner = self._number(self._signed()).value
        self._depth -= 1
        return _Part("number", lambda values: -inner(values), start)

    def _atom(self) -> _Part:
        token = self._next
        if token.kind == "number":
            number = float(self._advance().text)
            return _Part("number", lambda values: number, token.position)
        if token.kind == "name" and token.text not in ("and", "or", "not"):
            metric = GateMetric.of(self._advance().text)
            self.metrics.append(metric)
            return _Part("number", lambda values: _known(metric, values), token.position)
        if self._take("("):
            self._deeper()
            inner = self._either()
            self._depth -= 1
            if not self._take(")"):
                raise self._unexpected("`)`")
            return inner._replace(position=token.position)
        raise self._unexpected("a number, a metric or `(`")

    # -- tokens --------------------------------------------------------------------------------

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _advance(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._next.text == text
        self._at += found
        return found

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise GateError(self._next.position, f"nested more than {MAX_DEPTH} deep")

    def _condition(self, part: _Part) -> _Part:
        if part.kind != "condition":
            raise self._unexpected("a comparison (`<`, `<=`, `>`, `>=`, `==` or `!=`)")
        return part

    def _number(self, part: _Part) -> _Part:
        if part.kind != "number":
            raise GateError(part.position, "expected a number or a metric, got a condition")
        return part

    def _unexpected(self, wanted: str) -> GateError:
        got = "the end" if self._next.kind == "end" else repr(self._next.text)
        return GateError(self._next.position, f"expected {wanted}, got {got}")


def _tokens(text: str) -> list[_Token]:
    found, at = list[_Token](), 0
    while not found or found[-1].kind != "end":
        match = _TOKEN.match(text, at)
        if match is None:
            at = len(text) - len(text[at:].lstrip())
            raise GateError(at, f"unexpected {text[at]!r}")
        kind = match.lastgroup or "end"
        found.append(_Token(kind, match[kind], match.start(kind)))
        at = match.end()
    return found


def _known(metric: GateMetric, values: Values) -> float:
    value = values.get(metric.key)
    if value is None or math.isnan(value):
        raise GateUndefined(f"{metric} is not known")
    return value


def _applied(
    function: Callable[[float, float], float], one: Callable[[Values], float], other: Callable[[Values], float]
) -> Callable[[Values], float]:
    def value(values: Values) -> float:
        try:
            return function(one(values), other(values))
        except (ZeroDivisionError, OverflowError) as error:
            raise GateUndefined(str(error)) from error

    return value


def _either_of(one: Callable[[Values], float], other: Callable[[Values], float]) -> Callable[[Values], float]:
    return lambda values: one(values) or other(values)


def _both_of(one: Callable[[Values], float], other: Callable[[Values], float]) -> Callable[[Values], float]:
    return lambda values: one(values) and other(values)


# -- publishing ------------------------------------------------------------------------------------

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
