"""Keys of evaluations: what is measured when, which metric decides, and what a gate may ask for."""

from collections.abc import Iterator

import regex

from runtime.trainer.recipe.gate import GateMetric
from runtime.trainer.recipe.metrics import GENERATED, OF_LOSS, REWARDS, higher_is_better, plain_metric, scorer_name
from runtime.trainer.recipe.schema import Recipe
from settings import suggest

_NEEDS_DATA = "needs test data: set val_set_size or test_datasets"
_FUNCTION = regex.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def evaluation_problems(recipe: Recipe, given: set[str]) -> Iterator[tuple[str, str]]:
    """Conflicts of the keys of evaluations. `given` are the keys that are on."""
    yield from _data(recipe)
    yield from _times(recipe, given)
    yield from _best(recipe)
    yield from _generation(recipe)
    if problem := recipe.publish.problem():
        yield "publish.when", problem
    for metric in recipe.publish.metrics:
        if problem := _gate_problem(recipe, metric):
            yield "publish.when", problem
            return


def _data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that ask for test data where there is none.

    Recipes come with `evals_per_epoch` whether or not they hold anything out, as Axolotl allows: noted.
    """
    if recipe.evaluates:
        return
    if recipe.early_stopping_patience is not None:
        yield "early_stopping_patience", _NEEDS_DATA
    if recipe.save_strategy == "best":
        yield "save_strategy", f"best {_NEEDS_DATA}"
    if recipe.do_causal_lm_eval:
        yield "do_causal_lm_eval", f"{_NEEDS_DATA}, or generation_datasets"


def _times(recipe: Recipe, given: set[str]) -> Iterator[tuple[str, str]]:
    if recipe.eval_strategy == "no":
        for name in ("eval_steps", "evals_per_epoch", "early_stopping_patience"):
            if name in given:
                yield name, "has no meaning with `eval_strategy: no`"
    for kind, names in (("eval", ("eval_steps", "evals_per_epoch")), ("save", ("save_steps", "saves_per_epoch"))):
        strategy = getattr(recipe, f"{kind}_strategy")
        if strategy == "steps" and not given.intersection(names):
            yield f"{kind}_strategy", f"steps needs {kind}_steps"
        if strategy == "epoch" and names[0] in given:
            yield names[0], f"has no meaning with `{kind}_strategy: epoch`"


def known_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Metrics that evaluations of this recipe may have."""
    own = [name for name in OF_LOSS if recipe.rl is None or name != "perplexity"]
    rewards = REWARDS if recipe.rl is not None else ()
    return (*own, *rewards, *GENERATED, *map(scorer_name, recipe.generation_scorers))


def _best(recipe: Recipe) -> Iterator[tuple[str, str]]:
    metric = plain_metric(recipe.metric_for_best_model)
    if problem := _unknown(recipe, metric):
        yield "metric_for_best_model", problem
    elif metric in GENERATED and recipe.do_causal_lm_eval is False:
        yield "metric_for_best_model", f"is {metric}, and do_causal_lm_eval is false: no answers are generated"
    elif metric != "loss" and not recipe.evaluates:
        yield "metric_for_best_model", _NEEDS_DATA
    elif metric in (*OF_LOSS, *REWARDS, *GENERATED) and recipe.greater_is_better not in (
        None,
        higher_is_better(metric),
    ):
        better = "higher" if higher_is_better(metric) else "lower"
        yield "greater_is_better", f"is at odds with metric_for_best_model: of {metric}, the {better} is better"


def _generation(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.generation_regex is not None:
        try:
            regex.compile(recipe.generation_regex)
        except regex.error as error:
            yield "generation_regex", f"is no regular expression: {error}"
    elif "regex" in recipe.generated_metrics:
        yield "generation_regex", "is missing: the metric regex is asked for"
    for function in recipe.generation_scorers:
        if not _FUNCTION.fullmatch(function):
            yield "generation_scorers", f"expected module:function, got {function[:80]!r}"
    names = [scorer_name(function) for function in recipe.generation_scorers]
    if taken := [name for name in names if name in (*OF_LOSS, *GENERATED) or names.count(name) > 1]:
        yield "generation_scorers", f"{taken[0]} is the name of another metric: rename the function"
    if recipe.do_causal_lm_eval is False:
        for name in ("generation_datasets", "generation_scorers"):
            if getattr(recipe, name):
                yield name, "has no meaning with `do_causal_lm_eval: false`"


def _gate_problem(recipe: Recipe, metric: GateMetric) -> str | None:
    if problem := _unknown(recipe, metric.metric):
        return problem
    if metric.scope == "train":
        measured = metric.metric in ("loss", "accuracy", *REWARDS)
        return None if measured else f"{metric} is not known: {metric.metric} is measured on test data alone"
    if not recipe.evaluates:
        return f"{metric} {_NEEDS_DATA}"
    if metric.metric in GENERATED and recipe.do_causal_lm_eval is False:
        return f"{metric} is of generated answers, and do_causal_lm_eval is false"
    return None


def _unknown(recipe: Recipe, metric: str) -> str | None:
    """The problem of a metric that evaluations do not have."""
    known = known_metrics(recipe)
    if metric in known:
        return None
    if metric in REWARDS:
        return f"{metric} is of preferences, and there is no rl"
    near = suggest.hint(metric, known)
    return f"{metric[:80]!r} is no metric of this recipe{near}; there are {', '.join(known)}"
