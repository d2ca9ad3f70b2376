"""Checks of a recipe against the served model: the linears that it adapts, its template and its tokens."""

from collections.abc import Iterator, Mapping, Sequence

import regex

from runtime.errors import InvalidRequest
from runtime.text.chat_template import BUILTIN_TEMPLATES, builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.recipe import Recipe
from runtime.trainer.shape import ModelShape

# -- targets ---------------------------------------------------------------------------------------
#
# Linears that a recipe adapts, by PEFT's rules for `target_modules`.

TargetKey = tuple[int, str]
"""Layer index, and the linear's name in it, such as `self_attn.q_proj`."""

_PARAM = "lora_target_modules"
_PATIENCE = 1.0
"""Seconds for a regular expression on all names: some take longer than the universe has."""


def resolve_targets(recipe: Recipe, shape: ModelShape) -> list[TargetKey]:
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


def by_linear(targets: Sequence[TargetKey], places: Mapping[str, tuple[str, str]]) -> dict[tuple[int, str], list[str]]:
    """Targets by the decoder's linears (layer, linear), each with its parts in the order in which they lie there.
    `places` is the `LORA_TARGETS` of the architecture: name in the checkpoint → linear and part."""
    wanted = set(targets)
    found: dict[tuple[int, str], list[str]] = {}
    for layer in sorted({layer for layer, _ in targets}):
        for name, (linear, part) in places.items():  # in that order
            if (layer, name) in wanted:
                found.setdefault((layer, linear), []).append(part)
    return found


def _matching(pattern: str, places: list[TargetKey], shape: ModelShape) -> list[TargetKey]:
    try:
        compiled = regex.compile(pattern)
        return [place for place in places if compiled.fullmatch(_full(place, shape), timeout=_PATIENCE)]
    except regex.error as error:
        raise InvalidRequest(f"{_PARAM} is no regular expression: {error}.", param=_PARAM) from None
    except TimeoutError:
        raise InvalidRequest(f"{_PARAM}: the expression takes over {_PATIENCE} s to match.", param=_PARAM) from None


def _full(place: TargetKey, shape: ModelShape) -> str:
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


# -- template and tokens ---------------------------------------------------------------------------
#
# Checks of a recipe's template and tokens against those of the served model.
#
# An adapter is served with the model's own chat template and vocabulary. Were it trained with others, it would never
# see in serving what it saw in training, so a recipe may name them, but not change them.

OWN = ("tokenizer_default", "jinja")
_FALLBACK = "tokenizer_default_fallback_"

MARKS = {
    "chatml": "<|im_start|>",
    "qwen_25": "<|im_start|>",
    "qwen3": "<|im_start|>",
    "qwen3_5": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "llama3_2_vision": "<|start_header_id|>",
    "llama4": "<|header_start|>",
    "gemma": "<start_of_turn>",
    "gemma3": "<start_of_turn>",
    "gemma3n": "<start_of_turn>",
    "gemma4": "<|turn>",
    "phi_3": "<|user|>",
    "phi_35": "<|user|>",
    "phi_4": "<|im_sep|>",
    "mistral_v1": "[INST]",
    "mistral_v2v3": "[INST]",
    "mistral_v3_tekken": "[INST]",
    "mistral_v7_tekken": "[INST]",
    "cohere": "<|START_OF_TURN_TOKEN|>",
    "command_a": "<|START_OF_TURN_TOKEN|>",
    "alpaca": "### Instruction:",
    "llama2": "[INST]",
    "mistral": "[INST]",
    "phi3": "<|user|>",
    "qwen2.5": "<|im_start|>",
    "vicuna": "ASSISTANT:",
    "zephyr": "<|user|>",
}
"""Axolotl's name of a template, or that of a built-in one → a text that a template of this kind writes."""


def check_templates(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise `InvalidRequest` where a template is named that the served model's own is not."""
    own = tokenizer.chat_template
    named = [("chat_template", recipe.chat_template)]
    for group, entries in (("datasets", recipe.datasets), ("test_datasets", recipe.test_datasets)):
        named += [(f"{group}[{index}].chat_template", entry.chat_template) for index, entry in enumerate(entries)]
    for param, name in named:
        if name is not None and not name.startswith(_FALLBACK) and name not in OWN:
            _check_kind(param, name, own)
    if recipe.chat_template_jinja is not None and recipe.chat_template_jinja.strip() != (own or "").strip():
        raise InvalidRequest(
            "chat_template_jinja is not the served model's own template, with which the adapter will be asked. Start "
            "the server with it (--chat-template FILE), or leave it out.",
            param="chat_template_jinja",
        )


def end_ids(recipe: Recipe, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a turn: the model's, and the recipe's `eot_tokens`.

    Raises `InvalidRequest` for tokens that the vocabulary does not have, or that differ from the recipe's.
    """
    for param, token in _required(recipe):
        if tokenizer.token_id(token) is None:
            raise InvalidRequest(
                f"{param}: the model's vocabulary has no token {token[:64]!r}, and embeddings are not trained, so none "
                "can be added.",
                param=param,
            )
    for name, token in recipe.special_tokens.items():
        _check_special(name, token, tokenizer)
    further = (tokenizer.token_id(token) for token in recipe.eot_tokens)
    return frozenset([*tokenizer.eos_ids, *(id for id in further if id is not None)])


def _required(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from (("eot_tokens", token) for token in recipe.eot_tokens)
    if not isinstance(recipe.tokens, dict):
        yield from (("tokens", token) for token in recipe.tokens)


def _check_special(name: str, token: str, tokenizer: Tokenizer) -> None:
    id = tokenizer.token_id(token)
    if name == "eos_token" and id not in tokenizer.eos_ids:
        ends = ", ".join(repr(tokenizer.token_text(end)) for end in tokenizer.eos_ids) or "nothing"
        raise InvalidRequest(
            f"special_tokens.eos_token is {token[:64]!r}, but the served model ends with {ends}.",
            param="special_tokens.eos_token",
        )
    if name == "bos_token" and tokenizer.bos_id is not None and id != tokenizer.bos_id:
        raise InvalidRequest(
            f"special_tokens.bos_token is {token[:64]!r}, but the served model's is "
            f"{tokenizer.token_text(tokenizer.bos_id)!r}.",
            param="special_tokens.bos_token",
        )


def _check_kind(param: str, name: str, own: str | None) -> None:
    if own is None:
        raise InvalidRequest(
            f"{param} is {name[:64]!r}, but the served model has no chat template: start the server with one "
            f"(--chat-template {_operand(name)}).",
            param=param,
        )
    if own == builtin_template(name):
        return
    if name not in MARKS:
        known = ", ".join([OWN[0], *MARKS])
        raise InvalidRequest(f"{param} is {name[:64]!r}; known are {known}.", param=param)
    if MARKS[name] not in own:
        raise InvalidRequest(
            f"{param} is {name!r}, but the served model's chat template does not write {MARKS[name]}. The adapter will "
            "be asked with the served template, so it is trained with it: use tokenizer_default, or start the server "
            f"with another template (--chat-template {_operand(name)}).",
            param=param,
        )


def _operand(name: str) -> str:
    return name if name in BUILTIN_TEMPLATES else "FILE"
