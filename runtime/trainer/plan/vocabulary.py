"""The vocabulary of a recipe's adapter: tokens that the model lacks, other texts for reserved ones, the end of texts,
and the rows of embedding and head that are trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from runtime.errors import InvalidRequest
from runtime.model.vocabulary import RowTargets, VocabularyBase
from runtime.text.own_tokens import OwnToken, TokensInvalid
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.plan.served_model import ModelShape
from runtime.trainer.recipe import Recipe

MAX_NEW_TOKENS = 1024
"""Largest number of tokens that a recipe adds."""
_SHOWN = 5
"""New tokens that a note names."""
_ADDED = ("eos_token", "additional_special_tokens")
"""Special tokens that are added where the vocabulary lacks them: no row has the others."""


@dataclass(frozen=True)
class VocabularyPlan:
    """Changes that an adapter makes to the vocabulary."""

    tokenizer: Tokenizer = field(repr=False)
    """The model's, with the adapter's tokens."""
    tokens: tuple[OwnToken, ...] = ()
    eos_id: int | None = None
    """Id that ends the adapter's texts; None: the model's."""
    size: int | None = None
    """Number of ids where they are more than the model's; else None."""
    rows: RowTargets = field(default_factory=RowTargets, repr=False)
    """Rows that are trained."""

    def notes(self) -> Iterator[str]:
        """Remarks on new tokens and whole copies."""
        rows = self.rows
        if rows.fresh:
            named = [repr(token.text) for token in self.tokens if token.id in rows.fresh]
            more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
            yield (
                f"{len(named)} tokens are new ({', '.join(named[:_SHOWN])}{more}): their rows of embedding and head "
                "are trained with the adapter, which brings them along."
            )
        if self.size is not None:
            yield f"PEFT loads this adapter on a base that was resized: model.resize_token_embeddings({self.size})."
        if rows.copies:
            yield (
                f"lora_modules_to_save trains whole copies ({', '.join(rows.copies)}): {rows.rows} rows, which every "
                "server of the adapter holds beside the base."
            )


def plan_vocabulary(
    recipe: Recipe, tokenizer: Tokenizer, shape: ModelShape, *, template: str | None = None, limit: int | None = None
) -> VocabularyPlan:
    """The vocabulary of a recipe's adapter. `template`: source of the adapter's chat template; `limit`: most bytes of
    its rows as they are served.

    Raises `InvalidRequest` for tokens and rows that do not fit the model.
    """
    template = template or tokenizer.chat_template or ""
    own = [*_renamed(recipe, tokenizer), *_new(recipe, tokenizer, template)]
    eos_id = _eos_id(recipe, tokenizer, own)
    extended = tokenizer
    if own or eos_id is not None:
        rows = max([shape.vocab_size, *(token.id + 1 for token in own)])
        try:
            extended = tokenizer.with_tokens(tuple(own), rows=rows, eos_id=eos_id)
        except TokensInvalid as error:
            raise InvalidRequest(f"added_tokens_overrides: {error}.", param="added_tokens_overrides") from None
    size = max(shape.vocab_size, extended.num_ids)
    targets = _targets(recipe, shape, own, frozenset(recipe.added_tokens_overrides.values()), size)
    base = shape.vocabulary
    if base is not None and limit is not None and (needed := base.bytes_of(targets.rows)) > limit:
        param = "lora_modules_to_save" if targets.copies else "peft_trainable_token_indices"
        raise InvalidRequest(
            f"{param}: {targets.rows} rows of embedding and head take {needed} bytes with every server of the adapter; "
            f"the setting adapters.max_vocabulary_bytes allows {limit}.",
            param=param,
        )
    return VocabularyPlan(extended, tuple(own), eos_id, size if size > shape.vocab_size else None, targets)


# -- tokens ----------------------------------------------------------------------------------------


def _renamed(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[OwnToken]:
    for key, text in recipe.added_tokens_overrides.items():
        param = f"added_tokens_overrides.{key[:20]}"
        if not (key.isdecimal() and len(key) < 10 and tokenizer.is_added(int(key))):
            raise InvalidRequest(f"{param} is no id of an added token of the served model.", param=param)
        if (known := tokenizer.token_id(text)) is not None and known != int(key):
            raise InvalidRequest(f"{param}: the vocabulary has {text[:64]!r} already, as {known}.", param=param)
        if known is None:
            yield OwnToken(int(key), text, special=True)


def _new(recipe: Recipe, tokenizer: Tokenizer, template: str) -> list[OwnToken]:
    renamed = set(recipe.added_tokens_overrides.values())
    wanted: dict[str, bool] = {}
    for text, special in _wanted(recipe):
        if text not in renamed and tokenizer.token_id(text) is None:
            # What the template writes must not be written by a client.
            wanted[text] = wanted.get(text, False) or special or text in template
    if len(wanted) > MAX_NEW_TOKENS:
        raise InvalidRequest(
            f"tokens may name at most {MAX_NEW_TOKENS} that the vocabulary lacks, got {len(wanted)}.", param="tokens"
        )
    return tokenizer.new_tokens(list(wanted.items())) if wanted else []


def _wanted(recipe: Recipe) -> Iterator[tuple[str, bool]]:
    """Every token that a recipe needs, and whether it is special."""
    if isinstance(recipe.tokens, dict):
        yield from ((text, True) for name, text in recipe.tokens.items() if name in _ADDED)
    else:
        yield from ((text, False) for text in recipe.tokens)
    for name, value in recipe.special_tokens.items():
        if name in _ADDED:
            yield from ((text, True) for text in ((value,) if isinstance(value, str) else value or ()) if text)


def _eos_id(recipe: Recipe, tokenizer: Tokenizer, own: list[OwnToken]) -> int | None:
    text = recipe.special_tokens.get("eos_token")
    if not isinstance(text, str) or not text:
        return None
    id = next((token.id for token in own if token.text == text), tokenizer.token_id(text))
    return None if id in tokenizer.eos_ids[:1] else id


# -- rows ------------------------------------------------------------------------------------------


def _targets(recipe: Recipe, shape: ModelShape, own: list[OwnToken], renamed: frozenset[str], size: int) -> RowTargets:
    base = shape.vocabulary
    given = recipe.peft_trainable_token_indices
    param = (
        "peft_trainable_token_indices" if given else "lora_modules_to_save" if recipe.lora_modules_to_save else "tokens"
    )
    if not (own or given or recipe.lora_modules_to_save):
        return RowTargets()
    if base is None:
        raise InvalidRequest(
            f"{param}: this model runs in transformers' own modules, for which no rows of embedding or head are "
            "trained: use tokens that the vocabulary has, and leave it out.",
            param=param,
        )
    copies = _copies(recipe, base)
    indices = _indices(recipe, base, size)
    for kind in copies:
        if kind in indices:
            raise InvalidRequest(
                f"peft_trainable_token_indices has rows of {base.full_name(kind)}, which lora_modules_to_save "
                "trains as a whole: name it in one of them.",
                param="peft_trainable_token_indices",
            )
    fresh = tuple(sorted(token.id for token in own if token.text not in renamed))
    trained = {token.id for token in own}
    if base.tied and len(copies) == 1 and trained:
        raise InvalidRequest(
            "lora_modules_to_save: new tokens need rows of embedding and head, which are one matrix in this model: "
            f"name both, {base.embedding} and {base.head}, or neither.",
            param="lora_modules_to_save",
        )
    embedding = () if "embedding" in copies else tuple(sorted(trained.union(indices.get("embedding", ()))))
    head = () if "head" in copies else tuple(sorted(trained.union(indices.get("head", ()))))
    tied = base.tied and (not copies or recipe.peft_ensure_weight_tying)
    if tied and not copies and head not in (tuple(sorted(trained)), embedding):
        tied = False  # PEFT has two sets of rows then
    if tied:
        head = embedding
        copies = ("embedding", "head") if copies else ()
    return RowTargets(embedding=embedding, head=head, copies=copies, size=size, fresh=fresh, tied=tied)


def _copies(recipe: Recipe, base: VocabularyBase) -> tuple[str, ...]:
    found = set[str]()
    for name in recipe.lora_modules_to_save:
        kind = base.named(name)
        if kind is None:
            raise InvalidRequest(
                f"lora_modules_to_save: {name[:64]!r} is neither {base.embedding} nor {base.head}: whole copies are "
                "trained of these two; adapt other modules with lora_target_modules, or leave them out.",
                param="lora_modules_to_save",
            )
        found.add(kind)
    return tuple(kind for kind in ("embedding", "head") if kind in found)


def _indices(recipe: Recipe, base: VocabularyBase, size: int) -> Mapping[str, tuple[int, ...]]:
    param, given = "peft_trainable_token_indices", recipe.peft_trainable_token_indices
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in given.items() if isinstance(given, dict) else [(base.embedding, given)] if given else []:
        kind = base.named(name)
        if kind is None:
            raise InvalidRequest(
                f"{param}: {name[:64]!r} is neither {base.embedding} nor {base.head}.", param=f"{param}.{name[:64]}"
            )
        if wrong := [id for id in ids if not 0 <= id < size]:
            raise InvalidRequest(f"{param}: ids must be from 0 to {size - 1}, got {wrong[0]}.", param=param)
        found[kind] = tuple(sorted(set(ids)))
    return found
