"""Recipes for launched jobs, as they are read."""

from typing import Any

import pytest

from runtime.trainer.recipe import Document, Recipe, RecipeError, recipe_from

BASIC: dict[str, Any] = {"learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}]}


def make(available: int = 2, /, **keys: Any) -> Recipe:
    return recipe_from(Document({**BASIC, **keys}), max_lora_rank=64, devices=available)


def problems(available: int = 2, /, **keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        make(available, **keys)
    return {problem.key: problem.message for problem in caught.value.problems}
