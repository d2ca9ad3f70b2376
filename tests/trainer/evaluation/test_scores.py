"""Metrics of answers, against hand-written numbers; BLEU and the like against the packages themselves."""

import importlib.util
from typing import Any

import pytest

from runtime.errors import Forbidden, InvalidRequest
from runtime.text.tool_calls import FORMATS
from runtime.trainer.evaluation.scores import ComparedAnswer, Scoring, calls_of, make_scoring
from runtime.trainer.recipe import Document, Recipe, recipe_from


def score(name: str, pairs: list[tuple[str, str]], **more: Any) -> float | None:
    """The metric of (answer, reference)."""
    answers = [ComparedAnswer("p", reference, answer, reference, answer) for answer, reference in pairs]
    found = Scoring([name], **more).score(answers)
    assert not found.problems
    return found.metrics.get(name)


@pytest.mark.parametrize(
    ("name", "pairs", "value"),
    [
        ("exact_match", [("yes", "yes"), (" yes\n", "yes"), ("Yes", "yes"), ("", "yes")], 0.5),
        ("token_f1", [("the red newt", "red newt"), ("", "a"), ("", ""), ("A.", "a .")], (0.8 + 0 + 1 + 1) / 4),
        ("json_valid", [('{"a": 1}', ""), ("[1,]", ""), ("NaN", ""), (" 3 ", ""), ("```json\n{}\n```", "")], 0.4),
    ],
)
def test_a_metric(name: str, pairs: list[tuple[str, str]], value: float) -> None:
    assert score(name, pairs) == pytest.approx(value)


def test_a_pattern_is_searched_and_given_up_after_a_second() -> None:
    assert score("regex", [("it is 42.", ""), ("none", "")], pattern=r"\d+") == 0.5
    assert score("regex", [("a" * 40 + "b", "")], pattern=r"(a|aa|a*)+$") == 0.0


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"b": [2], "a": 1}}]'),
    ],
)
def test_calls_of_tools(form: str, text: str) -> None:
    tools = FORMATS[form]
    assert dict(calls_of(text, tools)) == {("add", '{"a": 1, "b": [2]}'): 1}
    other = text.replace("1", "3")
    rows = [(text, text), (other, text), ("Hello.", text), ("Hello.", "Good day.")]
    assert score("tool_call", rows, tools=tools) == pytest.approx(1 / 3)  # the last row has no calls
    assert score("tool_call", [("Hello.", "Good day.")], tools=tools) is None


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="needs sacrebleu")
def test_sacrebleus_metrics() -> None:
    import sacrebleu  # type: ignore[import-not-found, unused-ignore]

    pairs = [("the cat sat on the mat", "the cat sat on a mat"), ("a newt swims in the pond", "newts swim in ponds")]
    answers, references = [pair[0] for pair in pairs], [[pair[1] for pair in pairs]]
    assert score("bleu", pairs) == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert score("chrf", pairs) == pytest.approx(sacrebleu.corpus_chrf(answers, references).score)
    assert score("ter", pairs) == pytest.approx(sacrebleu.corpus_ter(answers, references).score)
    assert score("bleu", [(pairs[0][1], pairs[0][1])]) == pytest.approx(100)


@pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")
def test_rouge_l() -> None:
    """The longest common subsequence of "police killed the gunman" and "police kill the gunman" has 3 words of 4."""
    assert score("rouge_l", [("police kill the gunman", "police killed the gunman")]) == pytest.approx(0.75)


# -- an operator's scorers -------------------------------------------------------------------------


def half(prompt: str, answer: str, reference: str) -> float:
    assert prompt == "p"
    return 0.5 if answer == reference else 0.0


def broken(prompt: str, answer: str, reference: str) -> float:
    raise ValueError("no such word")


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}], "val_set_size": 1}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


HERE = "tests.trainer.evaluation.test_scores"


def test_a_scorer_of_the_operators() -> None:
    functions = [f"{HERE}:half", f"{HERE}:broken"]
    scoring = make_scoring(recipe(generation_scorers=functions), None, functions)
    found = scoring.score([ComparedAnswer("p", "a", "a"), ComparedAnswer("p", "a", "b")])
    assert found.metrics == {"half": 0.25}
    assert found.problems == ["broken could not be computed: ValueError: no such word"]


@pytest.mark.parametrize(
    ("function", "allowed", "error"),
    [
        (f"{HERE}:half", (), Forbidden),
        ("os:system", (f"{HERE}:half",), Forbidden),
        (f"{HERE}:absent", (f"{HERE}:absent",), InvalidRequest),
        ("no_such_module:f", ("no_such_module:f",), InvalidRequest),
        (f"{HERE}:HERE", (f"{HERE}:HERE",), InvalidRequest),
    ],
)
def test_only_what_the_setting_names_is_imported(
    function: str, allowed: tuple[str, ...], error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        make_scoring(recipe(generation_scorers=[function]), None, allowed)
    assert raised.value.param == "generation_scorers"  # type: ignore[attr-defined]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"needs the package sacrebleu.*eft-server\[evaluation\]"):
        make_scoring(recipe(eval_causal_lm_metrics=["chrf"]), None, ())


def test_calls_need_a_form() -> None:
    with pytest.raises(InvalidRequest, match="how tools are called"):
        make_scoring(recipe(eval_causal_lm_metrics=["tool_call"]), None, ())
