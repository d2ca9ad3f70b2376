"""The keys of recipes for people and for editors: docs/recipes.md and a JSON schema, made from the structs."""

import re
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.noted import NOTED
from runtime.trainer.recipe.reference_text import HEAD, TAIL
from runtime.trainer.recipe.refused import REFUSED
from runtime.trainer.recipe.schema import Recipe
from runtime.trainer.recipe.types import describe

GROUPS = {
    "model": "Model and result",
    "lora": "Adapter",
    "data": "Data",
    "training": "Training",
    "evaluation": "Evaluation and checkpoints",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, noted keys included: for editors that check YAML."""
    schema = msgspec.json.schema(Recipe)
    properties = schema["$defs"]["Recipe"]["properties"]
    del properties["notes"]
    for name, why in NOTED.items():
        properties[name] = {"description": f"Ignored: {why}."}
    return schema


def reference() -> str:
    """The page docs/recipes.md."""
    lines = [HEAD.rstrip()]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", *_table(Recipe, group)]
        if group == "data":
            lines += ["", "### An entry of `datasets` and `test_datasets`", "", *_table(Dataset)]
    lines += ["", "## Accepted and noted", "", *_NOTED_HEAD, "", "| key | ignored because |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in NOTED.items()]
    lines += ["", "## Refused", "", *_REFUSED_HEAD, "", "| key | |", "|---|---|"]
    lines += [f"| `{name}` | {refused.why} |" for name, refused in REFUSED.items() if not refused.later]
    later = sorted(name for name, refused in REFUSED.items() if refused.later)
    lines += ["", "Not supported yet: " + ", ".join(f"`{name}`" for name in later) + ".", "", TAIL.strip()]
    return "\n".join(lines) + "\n"


_NOTED_HEAD = [
    "These say how something is computed or where a copy goes, never what is learned. The plan has a note for each",
    "that is given and not null or false.",
]
_REFUSED_HEAD = [
    "Null, false and empty values of these are accepted: they ask for nothing. Every other key is unknown, and an",
    "error that names the nearest known one.",
]


_UNLIMITED = re.compile(" and at most (2147483647|9223372036854775807)")
"""Limits that say no more than what a machine's numbers hold."""


def _table(struct: type[Struct], group: str | None = None) -> list[str]:
    hints = get_type_hints(struct, include_extras=True)
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(struct):
        metas = [meta for meta in get_args(hints[field.name])[1:] if isinstance(meta, Meta)]
        text = next((meta.description for meta in metas if meta.description), None)
        own = next((meta.extra["group"] for meta in metas if meta.extra), None)
        if text is not None and own == group:
            takes = _UNLIMITED.sub("", describe(hints[field.name]))
            rows.append(f"| `{field.name}` | {takes} | {_default(field)} | {text} |")
    return rows


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is NODEFAULT:
        return "required" if field.default_factory is NODEFAULT else "none"
    if field.default is None or field.default in ((), {}):
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value if isinstance(value, str) else msgspec.json.encode(value).decode()}`"
