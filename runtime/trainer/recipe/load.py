"""A recipe's text to a `Recipe`: every key accounted for, every problem found at once."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from runtime.errors import InvalidRequest, ModelNotFound
from runtime.trainer.recipe import notes
from runtime.trainer.recipe.checks import find_problems, resolve_batch
from runtime.trainer.recipe.convert import convert_struct
from runtime.trainer.recipe.document import Document, read_document
from runtime.trainer.recipe.noted import NOTED
from runtime.trainer.recipe.problems import Problem, RecipeError
from runtime.trainer.recipe.refused import REFUSED
from runtime.trainer.recipe.schema import Recipe

_BESIDE = frozenset(NOTED) | frozenset(REFUSED)
_NO_ADAPTER = "is missing: expected lora or qlora; training all weights is not supported, because they are being served"
_SWITCHES_ELSEWHERE = ("offload", "offload_disk", "unsloth")


def load_recipe(data: bytes, *, max_lora_rank: int, served: Iterable[str] | None = None) -> Recipe:
    """Read a recipe's YAML. `served` are the names of the served model, if it is to be checked.

    Raises `RecipeError` with all problems, each with its key and line, and `ModelNotFound`.
    """
    return recipe_from(read_document(data), max_lora_rank=max_lora_rank, served=served)


def recipe_from(document: Document, *, max_lora_rank: int, served: Iterable[str] | None = None) -> Recipe:
    """The same for values that did not come as YAML, such as a JSON object's: `Document(values)`."""
    values, problems = _checkpointing(document.values), list[Problem]()
    if values.get("adapter") is None:
        values["adapter"] = "lora"
        problems.append(Problem("adapter", _NO_ADAPTER, document.lines.get("adapter")))

    def report(key: str, message: str) -> None:
        problems.append(Problem(key, message, document.lines.get(key)))

    for key, refused in REFUSED.items():
        if not refused.asks_for_nothing(values.get(key)):
            report(key, f"is not supported: {refused.why}")
    recipe = convert_struct(Recipe, values, "", report, beside=_BESIDE)
    reported = {problem.key for problem in problems}
    for key, message in find_problems(recipe, values, max_lora_rank=max_lora_rank):
        if key not in reported:
            report(key, message)
    if not reported & {"batch_size", "micro_batch_size", "gradient_accumulation_steps"}:
        try:
            recipe = resolve_batch(recipe, values)
        except InvalidRequest as error:
            report(error.param or "batch_size", error.message)
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: problem.line or 0))
    if served is not None:
        check_base_model(recipe, served)
    return msgspec.structs.replace(recipe, notes=tuple(notes.of(recipe, document.values)))


def check_base_model(recipe: Recipe, served: Iterable[str]) -> None:
    """Raise `ModelNotFound` unless the recipe's base is the served model, or it names none.

    A path or hub id is the served model when its last part is one of its names, in any case.
    """
    if recipe.base_model is None:
        return
    names = list(served)
    if _last(recipe.base_model) not in {_last(name) for name in names} and recipe.base_model not in names:
        raise ModelNotFound(
            f"base_model is {recipe.base_model[:200]!r}, but this server serves {names[0]!r}: a job trains on the "
            "served model. Leave base_model out, or start a server with the other model.",
            param="base_model",
        )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _checkpointing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Axolotl's other ways of gradient checkpointing save memory elsewhere; here they are all the one way."""
    if values.get("gradient_checkpointing") in _SWITCHES_ELSEWHERE:
        return {**values, "gradient_checkpointing": True}
    return dict(values)
