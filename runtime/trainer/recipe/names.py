"""The name of the adapter that a recipe asks for."""

from runtime.trainer.adapters.names import name_problem
from runtime.trainer.recipe.schema import Recipe


def adapter_name(recipe: Recipe, job_id: str) -> str:
    """The name to publish under: the recipe's, else the last part of its `output_dir`, else the job's id."""
    last = (recipe.output_dir or "").rstrip("/").rpartition("/")[2]
    return recipe.name or (last if name_problem(last) is None else job_id)
