"""Comparison of generated answers with those of the rows.

Shares are from 0 to 1; BLEU, chrF and TER are sacrebleu's, from 0 to 100.
"""

import importlib
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import regex

from runtime.errors import Forbidden, InvalidRequest
from runtime.text.tool_calls import Tool, ToolFormat
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.publish import PACKAGES, scorer_name

REGEX_SECONDS = 1.0
"""Longest search in one answer; a pattern that takes longer is not found."""

_WORD = re.compile(r"\w+|[^\w\s]")
_NAME = re.compile(r"[\w.\-]+")

Scorer = Callable[[str, str, str], float]
"""An operator's: (prompt, answer, reference) → score."""


@dataclass(frozen=True)
class ComparedAnswer:
    """A generated answer beside the row's, as texts."""

    prompt: str
    reference: str
    answer: str
    raw_reference: str = ""
    """With special tokens, which some formats of tool calls begin with."""
    raw_answer: str = ""


@dataclass
class AnswerScores:
    """Metrics of a set of answers."""

    metrics: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Metrics that could not be computed, with the reason."""


class Scoring:
    """Computes the metrics that a recipe asks for."""

    def __init__(
        self,
        metrics: Sequence[str],
        *,
        pattern: str | None = None,
        tools: ToolFormat | None = None,
        scorers: Mapping[str, Scorer] | None = None,
    ) -> None:
        """`metrics`: names of `recipe.publish.GENERATED` and of `scorers`."""
        self._metrics = tuple(metrics)
        self._pattern = None if pattern is None else regex.compile(pattern)
        self._tools = tools
        self._scorers = scorers or {}

    def score(self, answers: Sequence[ComparedAnswer]) -> AnswerScores:
        """Compute all metrics. Blocks."""
        found = AnswerScores()
        for name in self._metrics if answers else ():
            try:
                value = self._metric(name, answers)
            except Exception as error:
                found.problems.append(f"{name} could not be computed: {type(error).__name__}: {error}")
                continue
            if value is not None and math.isfinite(value):
                found.metrics[name] = value
            elif value is not None:
                found.problems.append(f"{name} is not a finite number ({value})")
        return found

    def _metric(self, name: str, answers: Sequence[ComparedAnswer]) -> float | None:
        """The metric; None where these answers have none."""
        if name in self._scorers:
            scorer = self._scorers[name]
            return _mean([float(scorer(one.prompt, one.answer, one.reference)) for one in answers])
        if name == "regex":
            return _mean([self._matches(one.answer) for one in answers])
        if name == "tool_call":
            return self._tool_calls(answers)
        return _METRICS[name](answers)

    def _matches(self, text: str) -> bool:
        assert self._pattern is not None, "checked with the recipe"
        try:
            return self._pattern.search(text, timeout=REGEX_SECONDS) is not None
        except TimeoutError:
            return False

    def _tool_calls(self, answers: Sequence[ComparedAnswer]) -> float | None:
        """Share of the answers with the calls of the reference, of those rows in which either has calls."""
        assert self._tools is not None, "checked with the recipe"
        pairs = [(calls_of(one.raw_answer, self._tools), calls_of(one.raw_reference, self._tools)) for one in answers]
        counted = [answer == reference for answer, reference in pairs if answer or reference]
        return _mean(counted) if counted else None


def calls_of(text: str, form: ToolFormat) -> Counter[tuple[str, str]]:
    """The calls of tools in an answer: names, and arguments as JSON with sorted keys. Their order does not count."""
    parser = form.parser([Tool(name) for name in sorted(set(_NAME.findall(text)))])
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    for event in [*parser.feed(text), *parser.finish()]:
        if not isinstance(event, str):
            names.setdefault(event.index, event.name or "")
            texts[event.index] = texts.get(event.index, "") + event.arguments
    return Counter((name, _canonical(texts[index])) for index, name in names.items())


def _canonical(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return text


# -- metrics ---------------------------------------------------------------------------------------


def _exact_match(answers: Sequence[ComparedAnswer]) -> float:
    """Share of answers that are the reference, but for space around it."""
    return _mean([one.answer.strip() == one.reference.strip() for one in answers])


def _token_f1(answers: Sequence[ComparedAnswer]) -> float:
    """Mean F1 of words and signs in any order, in any case of letters (as SQuAD has it, arXiv:1606.05250)."""
    return _mean([_overlap(_words(one.answer), _words(one.reference)) for one in answers])


def _overlap(answer: Counter[str], reference: Counter[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (answer & reference).total()
    return 2 * common / (answer.total() + reference.total())


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _json_valid(answers: Sequence[ComparedAnswer]) -> float:
    """Share of answers that are one JSON value."""
    return _mean([_is_json(one.answer) for one in answers])


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _sacrebleu(function: str) -> Callable[[Sequence[ComparedAnswer]], float]:
    def corpus(answers: Sequence[ComparedAnswer]) -> float:
        module = importlib.import_module("sacrebleu")
        score = getattr(module, function)([one.answer for one in answers], [[one.reference for one in answers]])
        return float(score.score)

    return corpus


def _rouge_l(answers: Sequence[ComparedAnswer]) -> float:
    """Mean F1 of the longest common subsequence of words."""
    module = importlib.import_module("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rougeL"], use_stemmer=False)
    return _mean([scorer.score(one.reference, one.answer)["rougeL"].fmeasure for one in answers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_METRICS: dict[str, Callable[[Sequence[ComparedAnswer]], float]] = {
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "json_valid": _json_valid,
    "bleu": _sacrebleu("corpus_bleu"),
    "chrf": _sacrebleu("corpus_chrf"),
    "ter": _sacrebleu("corpus_ter"),
    "rouge_l": _rouge_l,
}


# -- checks ----------------------------------------------------------------------------------------


def make_scoring(recipe: Recipe, tools: ToolFormat | None, allowed: Sequence[str]) -> Scoring:
    """The scoring of a recipe. `tools`: form of the template's tool calls. `allowed`: scorers that the operator
    allows, `module:function`. Raises `InvalidRequest` and `Forbidden`."""
    metrics = recipe.generated_metrics
    for name in metrics:
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise InvalidRequest(
                f"The metric {name} needs the package {package}, which is not installed: pip install "
                "'eft-server[evaluation]'.",
                param="eval_causal_lm_metrics",
            )
    if "tool_call" in metrics and tools is None:
        raise InvalidRequest(
            "The metric tool_call needs a chat template that says how tools are called, and this one does not.",
            param="eval_causal_lm_metrics",
        )
    scorers = {scorer_name(function): _load_scorer(function, allowed) for function in recipe.generation_scorers}
    return Scoring(metrics, pattern=recipe.generation_regex, tools=tools, scorers=scorers)


def _load_scorer(function: str, allowed: Sequence[str]) -> Scorer:
    if function not in allowed:
        raise Forbidden(f"The setting trainer.scorers does not name the scorer {function}.", param="generation_scorers")
    module, _, path = function.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise InvalidRequest(
            f"The scorer {function} cannot be imported: {type(error).__name__}: {error}.", param="generation_scorers"
        ) from error
    if not callable(found):
        raise InvalidRequest(f"The scorer {function} is no function.", param="generation_scorers")
    scorer: Scorer = found
    return scorer
