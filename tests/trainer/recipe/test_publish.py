"""Conditions of `publish.when`: precedence as Python's, which is the oracle, and errors that name the place."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.trainer.recipe import Document, Publish, Recipe, RecipeError, recipe_from
from runtime.trainer.recipe.publish import MAX_DEPTH, Gate, GateError, GateMetric, GateUndefined

VALUES = {
    "eval_loss": 1.25,
    "eval_exact_match": 0.5,
    "base_exact_match": 0.25,
    "base_loss": 2.0,
    "train_loss": 1.0,
    "eval_rewards/margins": 0.75,
    "eval_nan": math.nan,
}


def make(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}], "val_set_size": 1}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


def problem(**keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as raised:
        make(**keys)
    return {problem.key: problem.message for problem in raised.value.problems}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("exact_match >= base.exact_match + 0.02", True),
        ("exact_match >= base.exact_match + 0.3", False),
        ("eval_exact_match == 0.5", True),
        ("loss < base.eval_loss", True),
        ("loss/2 < 0.7", True),
        ("rewards/margins > 0.5", True),
        ("eval_rewards/margins>0.5and loss<2", True),
        ("loss > 2 or exact_match > 0.4 and train_loss <= 1", True),
        ("(loss > 2 or exact_match > 0.4) and train_loss < 1", False),
        ("not loss > 2", True),
        ("not (loss > 2) and not exact_match > 0.6", True),
        ("-loss < -1", True),
        ("1 - 2 - 3 == -4", True),
        ("loss != 1.25", False),
        (".5e0 == exact_match", True),
    ],
)
def test_a_condition(text: str, allowed: bool) -> None:
    assert Gate(text).allows(VALUES) is allowed


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("loss is low", 6, "expected a comparison"),
        ("loss <", 7, "expected a number, a metric or `(`, got the end"),
        ("exact_match >> 3", 14, "got '>'"),
        ("0.1 < loss < 2", 12, "join two comparisons with `and`"),
        ("(loss < 2", 10, "expected `)`"),
        ("loss < 2)", 9, "got ')'"),
        ("loss < 2 exact_match", 10, "expected `and`, `or`, or the end"),
        ("(loss < 2) + 1 > 0", 1, "got a condition"),
        ("loss ** 2 < 1", 7, "got '*'"),
        ("open('x')", 6, 'unexpected "\'"'),
        ("", 1, "got the end"),
        ("loss and 3 < 4", 6, "expected a comparison"),
        ("(" * 30 + "1" + ")" * 30 + " < 2", 22, f"nested more than {MAX_DEPTH} deep"),
        ("not " * 30 + "loss < 2", 85, f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_an_error_names_the_place(text: str, place: int, message: str) -> None:
    with pytest.raises(GateError) as raised:
        Gate(text)
    assert str(raised.value).startswith(f"at character {place}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["chrf > 1", "nan > 0", "not nan > 0", "loss / (train_loss - 1) > 0"])
def test_what_is_not_known_publishes_nothing(text: str) -> None:
    with pytest.raises(GateUndefined):
        Gate(text).allows(VALUES)
    assert not Publish(when=text).decide(VALUES)[0]


def test_the_metrics_of_a_condition() -> None:
    assert Gate("bleu > base.sacrebleu + 1 and train_loss < 2 and eval_bleu < 99").metrics == (
        GateMetric("eval", "bleu"),
        GateMetric("base", "bleu"),
        GateMetric("train", "loss"),
    )


@given(
    st.recursive(
        st.sampled_from(["loss", "exact_match", "1", "2.5", "0.25"]),
        lambda inner: (
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner)
            | st.builds("{} {} {}".format, inner, st.sampled_from("+-*"), inner)
            | st.builds("-{}".format, inner)
        ),
        max_leaves=8,
    ),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.sampled_from(["{a} {sign} {b}", "not {a} {sign} {b}", "{a} {sign} {b} or 1 < 2 and {b} < {a}"]),
)
def test_conditions_are_pythons(a: str, sign: str, form: str) -> None:
    text = form.format(a=a, sign=sign, b="exact_match - 1")
    assert Gate(text).allows(VALUES) is bool(eval(text, {"loss": 1.25, "exact_match": 0.5}))


# -- in a recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"publish": {"when": "exact_mach > 0.5"}}, "publish.when", "did you mean exact_match?"),
        ({"publish": {"when": "train_exact_match > 0.5"}}, "publish.when", "measured on test data alone"),
        ({"publish": {"when": "base.loss > 1"}, "val_set_size": 0}, "publish.when", "needs test data"),
        ({"publish": {"when": "bleu > 1"}, "do_causal_lm_eval": False}, "publish.when", "do_causal_lm_eval is false"),
        ({"publish": {"when": "perplexity > 1"}, "rl": "dpo"}, "publish.when", "no metric of this recipe"),
        ({"metric_for_best_model": "eval_bleu", "greater_is_better": False}, "greater_is_better", "at odds"),
        ({"metric_for_best_model": "eval_los"}, "metric_for_best_model", "did you mean loss?"),
        ({"metric_for_best_model": "regex"}, "generation_regex", "is missing"),
        ({"generation_regex": "("}, "generation_regex", "no regular expression"),
        ({"generation_scorers": ["os.system"]}, "generation_scorers", "expected module:function"),
        ({"generation_scorers": ["a:bleu"]}, "generation_scorers", "name of another metric"),
        ({"generation_scorers": ["a:f", "b:f"]}, "generation_scorers", "name of another metric"),
        ({"do_causal_lm_eval": True, "val_set_size": 0}, "do_causal_lm_eval", "generation_datasets"),
        ({"do_causal_lm_eval": False, "generation_datasets": [{"path": "b"}]}, "generation_datasets", "no meaning"),
        ({"eval_causal_lm_metrics": ["comet"]}, "eval_causal_lm_metrics", "a list of perplexity, exact_match"),
        ({"eval_table_size": 101}, "eval_table_size", "at most 100"),
    ],
)
def test_one_problem(keys: dict[str, Any], key: str, message: str) -> None:
    found = problem(**keys)
    assert list(found) == [key]
    assert message in found[key]


@pytest.mark.parametrize(
    ("keys", "metrics", "rows"),
    [
        ({}, (), 0),
        ({"eval_causal_lm_metrics": ["perplexity"]}, (), 0),
        ({"eval_table_size": 3}, (), 3),
        ({"do_causal_lm_eval": True}, ("exact_match", "token_f1"), 200),
        ({"eval_causal_lm_metrics": ["sacrebleu", "chrf"], "generation_rows": 7}, ("bleu", "chrf"), 7),
        ({"eval_causal_lm_metrics": ["chrf"], "do_causal_lm_eval": False}, (), 0),
        ({"metric_for_best_model": "eval_rouge_l"}, ("rouge_l",), 200),
        ({"publish": {"when": "json_valid > 0.9 and eval_loss < 1"}}, ("json_valid",), 200),
        ({"generation_scorers": ["a.b:c"], "publish": {"when": "c > base.c"}}, ("c",), 200),
        ({"generation_datasets": [{"path": "b"}], "val_set_size": 0}, ("exact_match", "token_f1"), 200),
    ],
)
def test_what_is_generated(keys: dict[str, Any], metrics: tuple[str, ...], rows: int) -> None:
    recipe = make(**keys)
    assert recipe.generated_metrics == metrics
    assert recipe.num_generated == rows
    assert recipe.measures_base is (rows > 0)


def test_a_gate_on_the_base_alone_measures_it() -> None:
    assert make(publish={"when": "eval_loss < base.loss"}).measures_base
    assert not make(publish={"when": "eval_loss < 2"}).measures_base
