"""What an adapter or an alias may be called: it becomes a folder, a label, and the `model` of a request."""

import re

from runtime.errors import InvalidRequest

MAX_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_VERSION = re.compile(r"(.+)[:@]([0-9]{1,9})")
_CHECKPOINT = re.compile(r".+:ckpt-step-[0-9]+")


def name_problem(name: str) -> str | None:
    """What keeps `name` from being an adapter's name on any server, or None. ASCII only, so that no two look alike."""
    if not 1 <= len(name) <= MAX_NAME:
        return f"must have 1 to {MAX_NAME} characters, got {len(name)}"
    if not _NAME.fullmatch(name) or ".." in name:
        return (
            "must begin with a letter or digit and have only ASCII letters, digits, and `.`, `_`, `-`, `:`, "
            f"no two dots in a row; got {name!r}"
        )
    if _VERSION.fullmatch(name):
        return f"must not end like a version, `:` and a number; got {name!r}"
    if _CHECKPOINT.fullmatch(name):
        return f"must not end like a checkpoint, `:ckpt-step-` and a number; got {name!r}"
    return None


def check_name(name: str, *, base: str, param: str) -> None:
    """Raise `InvalidRequest` naming `param`. `base`: the name of the model that the adapters are for."""
    problem = name_problem(name)
    if problem is None and name.casefold() == base.casefold():
        problem = f"must not be the base model's name, {base!r}"
    if problem is not None:
        raise InvalidRequest(f"{param} {problem}.", param=param)


def checkpoint_name(name: str, step: int) -> str:
    """What a request calls the checkpoint of a job that will publish as `name`."""
    return f"{name}:ckpt-step-{step}"


def split_version(text: str) -> tuple[str, int] | None:
    """`name@3` or `name:3` → its two parts."""
    match = _VERSION.fullmatch(text)
    return (match[1], int(match[2])) if match else None
