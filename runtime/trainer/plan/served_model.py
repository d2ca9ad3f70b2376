"""The served model, as plans know it, and checks of a recipe against it: the linears that it adapts, its template and
its tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import regex
from msgspec import Struct

from runtime.errors import InvalidRequest
from runtime.model.vocabulary import VocabularyBase
from runtime.support.module_patterns import ModulePattern, PatternInvalid
from runtime.text.chat_template import ChatTemplateError
from runtime.text.templates import ALIASES, BUILTIN_TEMPLATES, builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.recipe import Recipe
from settings.suggest import hint

if TYPE_CHECKING:
    from runtime.model.lora_base import LoraBase
    from runtime.model.spec import DecoderSpec

# -- shape -----------------------------------------------------------------------------------------
#
# The part of a model's shape that decides the shape of its adapters: the linears, and sizes.


class ModelShape(Struct, frozen=True, kw_only=True):
    """One served model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    linears: dict[str, tuple[int, int]]
    """A layer's linears by their name in the checkpoint (`self_attn.q_proj`) → (in, out) features."""
    bytes_per_value: int = 4
    """Bytes of an activation: 4 in float32, 2 in bfloat16."""
    prefix: str = "model.layers"
    """Prefix of the full name of a linear, as PEFT writes it."""
    vocabulary: VocabularyBase | None = None
    """Embedding and head; None where no rows of them are trained."""


def shape_of_base(spec: "DecoderSpec", base: "LoraBase", *, bytes_per_value: int) -> ModelShape:
    """The shape of a model that is loaded."""
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        linears={name: (target.in_features, target.out_features) for name, target in base.targets.items()},
        bytes_per_value=bytes_per_value,
        prefix=base.layers,
        vocabulary=base.vocabulary,
    )


def shape_of(
    spec: "DecoderSpec",
    targets: Mapping[str, tuple[str, str]],
    *,
    bytes_per_value: int,
    prefix: str = "model.layers",
    vocabulary: VocabularyBase | None = None,
) -> ModelShape:
    """The shape of a decoder; `targets` is its architecture's `LORA_TARGETS`, `prefix` its `layers()`."""
    heads, groups, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    hidden = spec.hidden_size
    sizes = {
        ("qkv", "q"): (hidden, heads),
        ("qkv", "k"): (hidden, groups),
        ("qkv", "v"): (hidden, groups),
        ("qkv", ""): (hidden, heads + 2 * groups),
        ("out", ""): (heads, hidden),
        ("gate_up", "gate"): (hidden, inner),
        ("gate_up", "up"): (hidden, inner),
        ("gate_up", ""): (hidden, 2 * inner),
        ("down", ""): (inner, hidden),
    }
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=spec.vocab_size,
        linears={name: sizes[place] for name, place in targets.items()},
        bytes_per_value=bytes_per_value,
        prefix=prefix,
        vocabulary=vocabulary,
    )


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
    if recipe.lora_target_parameters:
        linears = ", ".join(name.rpartition(".")[2] for name in shape.linears)
        raise InvalidRequest(
            "lora_target_parameters: parameters of experts are served as they are, and not adapted: name linears in "
            f"lora_target_modules ({linears}), and leave it out.",
            param="lora_target_parameters",
        )
    modules = recipe.lora_target_modules
    places = [(layer, name) for layer in _layers(recipe, shape) for name in shape.linears]
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


def ranks_of(recipe: Recipe, shape: ModelShape, targets: Sequence[TargetKey]) -> list[int]:
    """The rank of each of the targets. Raises `InvalidRequest` for a key of `lora_rank_pattern` or `lora_alpha_pattern`
    that means none of them."""
    modules = [_full(place, shape) for place in targets]
    try:
        for key in ("lora_rank_pattern", "lora_alpha_pattern"):
            for name in ModulePattern(key, getattr(recipe, key)).unmatched(modules):
                ends = dict.fromkeys(module.rpartition(".")[2] for module in modules)
                raise InvalidRequest(
                    f"{key}: {name[:100]!r} is none of the adapted linears, which are {', '.join(ends)} (in full: "
                    f"{modules[0]}).",
                    param=f"{key}.{name[:64]}",
                )
        ranks = ModulePattern("lora_rank_pattern", recipe.lora_rank_pattern)
        return [ranks.get(module, recipe.lora_r) for module in modules]
    except PatternInvalid as error:
        raise InvalidRequest(str(error), param=str(error).partition(" ")[0]) from None


def _layers(recipe: Recipe, shape: ModelShape) -> Sequence[int]:
    given = recipe.peft_layers_to_transform
    if given is None or given == ():
        return range(shape.num_layers)
    layers = sorted({given} if isinstance(given, int) else set(given))
    if layers[-1] >= shape.num_layers:
        raise InvalidRequest(
            f"peft_layers_to_transform has {layers[-1]}, and the served model has the layers 0 to "
            f"{shape.num_layers - 1}.",
            param="peft_layers_to_transform",
        )
    return layers


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
# The chat template of a recipe, and checks of its tokens against those of the served model.
#
# A template that writes something else than the model's own goes with the adapter, which is asked with it.

_DEFAULT, _JINJA = "tokenizer_default", "jinja"
_FALLBACK = "tokenizer_default_fallback_"

MARKS = {
    "qwen3_5": "<|im_start|>",
    "qwen2_vl": "<|im_start|>",
    "llama3_2_vision": "<|start_header_id|>",
    "gemma4_unified": "<|turn>",
    "pixtral": "[INST]",
    "llava": "USER:",
}
"""Axolotl's names of templates that are not built in → a text that a model's own template of this kind writes."""


class TemplateChoice(NamedTuple):
    """A chat template that goes with the adapter."""

    name: str
    """As the recipe names it."""
    source: str


def choose_template(recipe: Recipe, tokenizer: Tokenizer) -> TemplateChoice | None:
    """The template of all chats of a recipe; None where it is the served model's own, or writes the same.

    Raises `InvalidRequest` for an unknown name, a template that does not compile, and templates that differ.
    """
    found: dict[str | None, tuple[str, str]] = {}
    for param, name, source in _named(recipe):
        chosen = _source_of(param, name, source, tokenizer)
        if recipe.chat_template_kwargs and (rest := chosen or tokenizer.chat_template) is not None:
            chosen = _with_variables(rest, recipe.chat_template_kwargs)
        found.setdefault(None if chosen is None or _alike(chosen, tokenizer) else chosen, (param, name))
    if len(found) > 1:
        (one, _), (other, _) = list(found.values())[:2]
        raise InvalidRequest(
            f"{other} is another template than {one}, and an adapter is asked with one: give all data sets of chats "
            "the same.",
            param=other,
        )
    return next((TemplateChoice(name, source) for source, (_, name) in found.items() if source is not None), None)


def _with_variables(source: str, variables: Mapping[str, bool | int | float | str]) -> str:
    """The template with values of variables for requests that do not set them."""
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for name, value in variables.items()
    ]
    return "".join(lines) + source


def _named(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """Key, name and source of the template of each dataset that may hold chats."""
    whole = recipe.chat_template or (_JINJA if recipe.chat_template_jinja is not None else _DEFAULT)
    for group, entries in (("datasets", recipe.datasets), ("test_datasets", recipe.test_datasets)):
        for index, entry in enumerate(entries):
            own = entry.chat_template or (_JINJA if entry.chat_template_jinja is not None else None)
            if own is not None:
                yield f"{group}[{index}].chat_template", own, entry.chat_template_jinja or recipe.chat_template_jinja
            elif (named := entry.template_of_type) is not None:
                yield f"{group}[{index}].type", named, None
            elif isinstance(entry.type, str) and (
                entry.type in ("auto", "openai") or entry.type.startswith("chat_template")
            ):
                yield "chat_template", whole, recipe.chat_template_jinja


def _source_of(param: str, name: str, source: str | None, tokenizer: Tokenizer) -> str | None:
    """The source that a name stands for; None for the served model's own."""
    own = tokenizer.chat_template
    if name.startswith(_FALLBACK):
        name = _DEFAULT if own is not None else name.removeprefix(_FALLBACK)
    if name == _DEFAULT:
        return None
    if name == _JINJA:
        if source is None:
            raise InvalidRequest(f"{param} is jinja, and chat_template_jinja is missing.", param=param)
        return source
    if (built_in := builtin_template(name)) is not None:
        return built_in
    if name not in MARKS:
        known = [_DEFAULT, f"{_FALLBACK}NAME", _JINJA, *sorted({*BUILTIN_TEMPLATES, *ALIASES})]
        raise InvalidRequest(f"{param} is {name[:64]!r}{hint(name, known)}; known are {', '.join(known)}.", param=param)
    if MARKS[name] not in (own or ""):
        raise InvalidRequest(
            f"{param} is {name!r}, which is not built in, and the served model's own template is of another kind: give "
            "its source in chat_template_jinja, or use tokenizer_default.",
            param=param,
        )
    return None


_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": " A\n"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": " B "}, {"role": "user", "content": "C"}],
)
_ANSWERED: tuple[list[dict[str, str]], ...] = tuple(
    [*chat, {"role": "assistant", "content": " B\n"}] for chat in _PROBES
)


def _alike(source: str, tokenizer: Tokenizer) -> bool:
    """True if a template writes the same as the served model's own, for chats without tools."""
    if tokenizer.chat_template is None:
        return False
    other = with_template(tokenizer, source)
    chats = [*((chat, True) for chat in _PROBES), *((chat, False) for chat in _ANSWERED)]
    try:
        return all(_same(chat, prompt, tokenizer, other) for chat, prompt in chats)
    except InvalidRequest:
        return False


def _same(chat: list[dict[str, str]], prompt: bool, *tokenizers: Tokenizer) -> bool:
    return len({one.render_chat(chat, add_generation_prompt=prompt) for one in tokenizers}) == 1


def with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """The tokenizer with a recipe's template. Raises `InvalidRequest` where that does not compile."""
    try:
        return tokenizer.with_template(source)
    except ChatTemplateError as error:
        raise InvalidRequest(f"{error}.", param="chat_template_jinja") from None


def end_ids(recipe: Recipe, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a turn: the model's, and the recipe's `eot_tokens`.

    Raises `InvalidRequest` for tokens that the vocabulary does not have, or that differ from the recipe's.
    """
    for token in recipe.eot_tokens:
        if tokenizer.token_id(token) is None:
            raise InvalidRequest(
                f"eot_tokens: the model's vocabulary has no token {token[:64]!r}: name it in tokens too, and its rows "
                "are trained with the adapter.",
                param="eot_tokens",
            )
    bos = recipe.special_tokens.get("bos_token")
    if isinstance(bos, str) and tokenizer.bos_id is not None and tokenizer.token_id(bos) != tokenizer.bos_id:
        raise InvalidRequest(
            f"special_tokens.bos_token is {bos[:64]!r}, but the served model's is "
            f"{tokenizer.token_text(tokenizer.bos_id)!r}.",
            param="special_tokens.bos_token",
        )
    further = (tokenizer.token_id(token) for token in recipe.eot_tokens)
    return frozenset([*tokenizer.eos_ids, *(id for id in further if id is not None)])
