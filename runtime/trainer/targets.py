"""Which linears a recipe adapts, by PEFT's rules for `target_modules`."""

import regex

from runtime.errors import InvalidRequest
from runtime.trainer.recipe import Recipe
from runtime.trainer.shape import ModelShape

Target = tuple[int, str]
"""Layer index, and the linear's name in it, such as `self_attn.q_proj`."""

_PARAM = "lora_target_modules"
_PATIENCE = 1.0
"""Seconds for a regular expression on all names: some take longer than the universe has."""


def resolve_targets(recipe: Recipe, shape: ModelShape) -> list[Target]:
    """The linears to adapt, in the order of the layers.

    An entry of a list is the end of full names, from a dot on; a text is a regular expression over whole full
    names, or `all-linear`. Raises `InvalidRequest`, listing the model's linears, when an entry is none of them.
    """
    modules = recipe.lora_target_modules
    places = [(layer, name) for layer in range(shape.num_layers) for name in shape.linears]
    if recipe.lora_target_linear or modules is None or modules == "all-linear":
        return places
    if isinstance(modules, str):
        found = _matching(modules, places, shape)
        if not found:
            raise _absent(f"the expression {modules[:200]!r} matches", shape)
        return found
    full = [(place, _full(place, shape)) for place in places]
    for entry in modules:
        if not any(_ends(name, entry) for _, name in full):
            raise _absent(f"{entry[:64]!r} is", shape)
    return [place for place, name in full if any(_ends(name, entry) for entry in modules)]


def _matching(pattern: str, places: list[Target], shape: ModelShape) -> list[Target]:
    try:
        compiled = regex.compile(pattern)
        return [place for place in places if compiled.fullmatch(_full(place, shape), timeout=_PATIENCE)]
    except regex.error as error:
        raise InvalidRequest(f"{_PARAM} is no regular expression: {error}.", param=_PARAM) from None
    except TimeoutError:
        raise InvalidRequest(f"{_PARAM}: the expression takes over {_PATIENCE} s to match.", param=_PARAM) from None


def _full(place: Target, shape: ModelShape) -> str:
    return f"{shape.prefix}.{place[0]}.{place[1]}"


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _absent(what: str, shape: ModelShape) -> InvalidRequest:
    linears = ", ".join(name.rpartition(".")[2] for name in shape.linears)
    return InvalidRequest(
        f"{_PARAM}: {what} no linear of the served model, whose linears are {linears} (in full: "
        f"{_full((0, next(iter(shape.linears))), shape)}).",
        param=_PARAM,
    )
