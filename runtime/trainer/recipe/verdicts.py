"""Verdicts on the keys of a recipe, one a key, and the explanation of one."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from msgspec import Meta, Struct

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.keys import (
    DATASET_NOTED,
    DATASET_REFUSED,
    NOTED,
    READ_AS,
    REFUSED,
    Refused,
    is_off,
)
from runtime.trainer.recipe.schema import DATA_GROUPS, INTERNAL, Recipe, keys_of
from runtime.trainer.recipe.types import describe
from settings import suggest


class Verdict(Struct, frozen=True, kw_only=True):
    """The verdict on a key that a recipe gives."""

    key: str
    verdict: Literal["works", "noted", "renamed", "off", "refused", "unknown"]
    why: str = ""
    """The reason, or the key that it is read as."""


def verdicts(values: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for each key that a recipe gives, those of its datasets included, in the recipe's order."""
    found = [_verdict(key, value, key, Recipe, NOTED, REFUSED) for key, value in values.items()]
    for group in DATA_GROUPS:
        entries = values.get(group)
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            if isinstance(entry, dict):
                found += [
                    _verdict(key, value, f"{group}[{index}].{key}", Dataset, DATASET_NOTED, DATASET_REFUSED)
                    for key, value in entry.items()
                ]
    return found


def _verdict(
    name: str, value: Any, path: str, struct: type[Struct], noted: Mapping[str, str], refused: Mapping[str, Refused]
) -> Verdict:
    fields = set(struct.__struct_fields__) - INTERNAL
    if name in fields:
        beside = struct is Recipe and name in keys_of("launched")
        off = is_off(value) if beside else value is None
        return Verdict(key=path, verdict="off" if off else "works", why=_BESIDE if beside else "")
    if struct is Recipe and name in READ_AS and not is_off(value):
        return Verdict(key=path, verdict="renamed", why=READ_AS[name])
    if name in noted:
        return Verdict(key=path, verdict="off" if is_off(value) else "noted", why=noted[name])
    if name in refused:
        off = refused[name].asks_for_nothing(value)
        return Verdict(key=path, verdict="off" if off else "refused", why=refused[name].why)
    if struct is Dataset and name in OLDER_DATASET_KEYS:
        return Verdict(key=path, verdict="renamed", why="a form of `type: sharegpt`, read as chat_template's keys")
    near = suggest.nearest(name, [*fields, *noted, *refused, *READ_AS], cutoff=0.75)
    return Verdict(key=path, verdict="unknown", why=f"did you mean {near}?" if near else "no key of this name is known")


_BESIDE = "where the server has devices set aside (trainer.devices); noted where the job runs inside it"

OLDER_DATASET_KEYS = frozenset({"conversation", "field_human", "field_model"})


def explain(name: str) -> str | None:
    """The effect of a key, in a few lines; None for a key that is not known. `datasets.KEY` asks for a dataset's."""
    plain = name.removeprefix("datasets.").removeprefix("test_datasets.")
    found = [] if plain != name else _explained(name, name, Recipe, NOTED, REFUSED)
    if plain == name and name in READ_AS:
        found.append(f"{name}: another name, or form, of {READ_AS[name]}.")
    found += _explained(plain, f"datasets.{plain}", Dataset, DATASET_NOTED, DATASET_REFUSED)
    if plain in OLDER_DATASET_KEYS:
        found.append(f"datasets.{plain}: a form of `type: sharegpt`, read as chat_template's keys.")
    return "\n".join(found) or None


def nearest_key(name: str) -> str | None:
    """The known key that is most like `name`."""
    known = [*Recipe.__struct_fields__, *NOTED, *REFUSED, *READ_AS, *Dataset.__struct_fields__]
    return suggest.nearest(name, known, cutoff=0.6)


def _explained(
    name: str, shown: str, struct: type[Struct], noted: Mapping[str, str], refused: Mapping[str, Refused]
) -> list[str]:
    if name in noted:
        return [f"{shown}: accepted with any value, and does nothing: {noted[name]}."]
    if name in refused:
        return [f"{shown}: refused when it is on: {refused[name].why}."]
    hint = get_type_hints(struct, include_extras=True).get(name)
    if hint is None or name in INTERNAL:
        return []
    text = next((meta.description for meta in get_args(hint)[1:] if isinstance(meta, Meta) and meta.description), "")
    default = getattr(struct, "__struct_defaults__", ())
    given = dict(zip(struct.__struct_fields__[len(struct.__struct_fields__) - len(default) :], default, strict=True))
    value = given.get(name)
    usual = f" Default: {value}." if isinstance(value, str | int | float) else ""
    beside = f" It acts {_BESIDE}." if struct is Recipe and name in keys_of("launched") else ""
    return [f"{shown}: {describe(hint)}.{usual} {text}{beside}".rstrip()]
