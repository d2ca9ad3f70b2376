"""Recipes: one YAML file a fine-tuning job, with Axolotl's key names."""

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.document import Document, Problem, RecipeError
from runtime.trainer.recipe.load import check_base_model, load_recipe, recipe_from
from runtime.trainer.recipe.publish import Publish
from runtime.trainer.recipe.schema import Recipe
from runtime.trainer.recipe.types import adapter_name
from runtime.trainer.recipe.values import OptimizerFamily

__all__ = [
    "Dataset",
    "Document",
    "OptimizerFamily",
    "Problem",
    "Publish",
    "Recipe",
    "RecipeError",
    "adapter_name",
    "check_base_model",
    "load_recipe",
    "recipe_from",
]
