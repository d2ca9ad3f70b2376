"""Names of the metrics of evaluations: those of the loss, of preferences, and of generated answers."""

from collections.abc import Mapping

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
