"""Whether what a recipe says of template and tokens is so for the served model.

An adapter is served with the model's own chat template and vocabulary. Were it trained with others, it would
never see in serving what it saw in training, so a recipe may name them, but not change them.
"""

from collections.abc import Iterator

from runtime.errors import InvalidRequest
from runtime.tokenizer import Tokenizer
from runtime.trainer.recipe import Recipe

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
}
"""Axolotl's name of a template → a text that a template of this kind writes."""


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

    Raises `InvalidRequest` for tokens that the vocabulary does not have, or that are not what the recipe says.
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
            "(--chat-template FILE).",
            param=param,
        )
    if name not in MARKS:
        known = ", ".join([OWN[0], *MARKS])
        raise InvalidRequest(f"{param} is {name[:64]!r}; known are {known}.", param=param)
    if MARKS[name] not in own:
        raise InvalidRequest(
            f"{param} is {name!r}, but the served model's chat template does not write {MARKS[name]}. The adapter will "
            "be asked with the served template, so it is trained with it: use tokenizer_default, or start the server "
            "with another template (--chat-template FILE).",
            param=param,
        )
