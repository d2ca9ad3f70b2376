"""Older names and forms of Axolotl's keys, read as what they are called now, with a note of the new lines."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from runtime.trainer.recipe.keys import is_off
from runtime.trainer.recipe.schema import DATA_GROUPS

RENAMED: dict[str, str] = {
    "adam_eps": "adam_epsilon",
    "evaluation_strategy": "eval_strategy",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "lora_layers_to_transform": "peft_layers_to_transform",
    "dion_learning_rate": "dion_lr",
    "context_parapllel_size": "context_parallel_size",  # misspelt in a recipe of Axolotl's
}
"""Older name of a key → today's."""
READ_AS = {**RENAMED, "curriculum_sampling": "shuffle_merged_datasets", "pretraining_dataset": "datasets"}
"""Key → the one that it is read as, in another form too."""

_SHAREGPT: dict[str, dict[str, Any]] = {
    "sharegpt": {"role": "from", "content": "value"},
    "sharegpt:chat": {"role": "from", "content": "value"},
    "sharegpt_simple": {"role": "from", "content": "value"},
    "sharegpt.load_role": {"role": "role", "content": "value"},
    "sharegpt.load_guanaco": {"role": "role", "content": "text"},
    "sharegpt.load_ultrachat": {"role": "role", "content": "content"},
}
"""Type → the template's names of a message's fields → the file's. Axolotl has dropped it for `chat_template`."""
_ROLES = {"input": "user", "output": "assistant"}
"""Sides of a chat, as the older `roles` called them."""
_SIDES = {"field_human": "user", "field_model": "assistant"}
"""Older keys with the name of one role."""


class Modern(Struct):
    """A recipe's values in today's form."""

    values: dict[str, Any]
    notes: list[str]


def modernise(values: Mapping[str, Any]) -> Modern:
    """The same recipe without older forms. What is not one of them stays, to be refused by name."""
    notes = list[str]()
    found = _curriculum(_renamed(values, notes), notes)
    for group in DATA_GROUPS:
        entries = found.get(group)
        many = [entries] if isinstance(entries, dict) and entries else entries
        if isinstance(many, list):
            found[group] = [_entry(entry, f"{group}[{index}]", notes) for index, entry in enumerate(many)]
    if isinstance(config := found.get("fsdp_config"), dict):
        found["fsdp_config"] = {name.removeprefix("fsdp_"): value for name, value in config.items()} or None
    return Modern(_pretraining(found, notes), notes)


def _renamed(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The values by today's names. An older name beside the new one stays, and is an unknown key."""
    found = dict[str, Any]()
    for name, value in values.items():
        new = RENAMED.get(name)
        if new is None or not is_off(values.get(new)):
            found[name] = value
        elif not is_off(value):
            found[new] = value
            notes.append(f"{name} is an older name; it is read as `{new}: {_flow(value)}`.")
    return found


def _curriculum(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if values.get("curriculum_sampling") is True and values.get("shuffle_merged_datasets") is not True:
        notes.append("curriculum_sampling is read as `shuffle_merged_datasets: false`: rows keep the files' order.")
        values["shuffle_merged_datasets"] = False
        del values["curriculum_sampling"]
    return values


def _pretraining(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`pretraining_dataset` as datasets of plain texts, read as far as `max_steps` takes."""
    given = values.get("pretraining_dataset")
    if is_off(given) or not is_off(values.get("datasets")):
        return values
    entries = given if isinstance(given, list) else [given]
    values["datasets"] = [
        _text_entry(entry if isinstance(entry, dict) else {"path": entry}, f"pretraining_dataset[{index}]", notes)
        for index, entry in enumerate(entries)
    ]
    del values["pretraining_dataset"]
    if values.get("max_steps") is not None and values.get("streaming") is None:
        values["streaming"] = True
    return values


def _text_entry(entry: Mapping[str, Any], path: str, notes: list[str]) -> dict[str, Any]:
    kind = entry.get("type")
    modern: dict[str, Any] = {"type": "completion" if kind in (None, "pretrain") else kind}
    if kind in (None, "pretrain", "completion"):
        modern["field"] = entry.get("text_column") or entry.get("field") or "text"
    rest = {key: value for key, value in entry.items() if key not in ("type", "text_column", "field", "skip")}
    if not is_off(entry.get("skip"), (0,)):
        rest["split"] = f"{entry.get('split') or 'train'}[{entry['skip']}:]"
    notes.append(f"{path} is read as an entry of datasets with {_lines(modern, modern)}.")
    return {**rest, **modern}


def _entry(entry: Any, path: str, notes: list[str]) -> Any:
    if not isinstance(entry, dict) or not isinstance(kind := entry.get("type"), str) or kind not in _SHAREGPT:
        return entry
    field = "messages" if kind.endswith("ultrachat") else "conversations"
    modern: dict[str, Any] = {
        "type": "chat_template",
        "field_messages": entry.get("field") or field,
        "message_property_mappings": _SHAREGPT[kind],
    }
    rest = {key: value for key, value in entry.items() if key not in ("type", "field", "conversation")}
    if entry.get("conversation") is not None:  # what fastchat called a template
        modern["chat_template"] = str(entry["conversation"]).replace("-", "_").lower()
    roles = rest.pop("roles", None)
    named = {_ROLES.get(role, role): names for role, names in (roles if isinstance(roles, dict) else {}).items()}
    for key, role in _SIDES.items():
        if isinstance(name := rest.pop(key, None), str):
            named.setdefault(role, [name])
    if named:
        modern["roles"] = named
    whole = {**modern, **rest}
    notes.append(f"{path}: type {kind} is an older form; it is read as {_lines(whole, modern)}.")
    return whole


def _lines(entry: Mapping[str, Any], modern: Mapping[str, Any]) -> str:
    """The lines that say the same today, as YAML has them."""
    return ", ".join(f"`{key}: {_flow(entry[key])}`" for key in modern)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(_flow, value)) + "]" if isinstance(value, list | tuple) else str(value)
