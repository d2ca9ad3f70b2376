"""Names of adapters: what may be one, and the one that a recipe asks for."""

import re
import unicodedata

from runtime.trainer.recipe.schema import Recipe

LONGEST = 128
_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


def name_problem(name: str) -> str | None:
    """What keeps `name` from being an adapter's name, or None."""
    if len(name) > LONGEST:
        return f"must have at most {LONGEST} characters, got {len(name)}"
    if not _ALLOWED.fullmatch(name) or unicodedata.normalize("NFKC", name) != name:
        return f"must be made of letters, digits and . _ : - and begin with a letter or digit, got {name[:64]!r}"
    return None


def adapter_name(recipe: Recipe, job_id: str) -> str:
    """The name to publish under: the recipe's, else the last part of its `output_dir`, else the job's id."""
    last = (recipe.output_dir or "").rstrip("/").rpartition("/")[2]
    return recipe.name or (last if name_problem(last) is None else job_id)
