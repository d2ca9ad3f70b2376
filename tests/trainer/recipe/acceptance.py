"""Check the keys of a folder of recipes, such as Axolotl's examples, and count the accepted ones by class:

    python -m tests.trainer.recipe.acceptance FOLDER [--classes CLASSES.csv] [--refused]

The table has the columns file, adapter, objective and modality; without it, all recipes are one class.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.errors import RequestError
from runtime.trainer.recipe import load_recipe

MAX_LORA_RANK = 256
"""Default of `adapters.max_lora_rank`."""


class Checked(NamedTuple):
    """A recipe and what became of it."""

    file: str
    kind: str
    refusal: str
    """Empty: accepted."""


def check_folder(folder: Path, classes: Path | None) -> Iterator[Checked]:
    """Check each recipe in a folder and the folders below."""
    kinds = dict(_kinds(classes)) if classes is not None else {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yml", ".yaml")):
        name = str(path.relative_to(folder))
        try:
            load_recipe(path.read_bytes(), max_lora_rank=MAX_LORA_RANK)
            refusal = ""
        except RequestError as error:
            refusal = error.message
        yield Checked(name, kinds.get(name, "recipes"), refusal)


def _kinds(table: Path) -> Iterator[tuple[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            tuning = "adapter" if row["adapter"] in ("lora", "qlora") else "all weights"
            yield row["file"], f"{tuning}, {row['objective']}, {row['modality']}"


def report(found: list[Checked], *, refused: bool) -> Iterator[str]:
    """A line a class: accepted, all, refused with one sentence; and, where asked for, the refusals."""
    for kind in sorted({one.kind for one in found}):
        some = [one for one in found if one.kind == kind]
        accepted = sum(not one.refusal for one in some)
        sentences = sum(bool(one.refusal) and "\n" not in one.refusal for one in some)
        yield f"{kind}: {accepted} of {len(some)} accepted, {sentences} refused with one sentence"
        if refused:
            yield from (f"    {one.file}: {one.refusal}" for one in some if one.refusal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=Path)
    parser.add_argument("--refused", action="store_true", help="print the refusals")
    asked = parser.parse_args()
    print("\n".join(report(list(check_folder(asked.folder, asked.classes)), refused=asked.refused)))  # noqa: T201


if __name__ == "__main__":
    main()
