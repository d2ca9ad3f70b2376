"""Random answers in a grammar, as a model without any sense would give them."""

import random
from collections.abc import Sequence

import numpy as np

from runtime.text.grammar import GrammarCompiler, GrammarState
from runtime.text.tokenizer import Tokenizer


def allowed(state: GrammarState, vocab_size: int) -> list[int]:
    """Ids whose bits a state sets."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    state.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any(), "bits beyond the vocabulary"
    return [int(id) for id in np.nonzero(bits)[0]]


def walk(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, seed: int, *, most: int = 400, begin: Sequence[int] = ()
) -> tuple[list[int], bool]:
    """Ids of an answer drawn at random, without the end, and whether it ended within twice `most` tokens. It ends where
    it may, mostly, and prefers tokens that close something; behind the first `most` it ends as soon as it can. `begin`:
    its first ids."""
    rng = random.Random(seed)
    state = compiler.compile(text).start()
    state.follow(begin)
    ids = list(begin)
    while len(ids) < 2 * most:
        hurries = len(ids) >= most
        choices = allowed(state, tokenizer.vocab_size)
        assert choices, f"no token is allowed after {tokenizer.decode(ids)!r}"
        if (only := state.forced()) is not None:
            assert choices == [only], "what is forced is all that is allowed"
        ends = set(choices) & set(tokenizer.eos_ids)
        if ends and (hurries or len(ends) == len(choices) or rng.random() < 0.7):
            return ids, True
        others = [id for id in choices if id not in ends]
        closing = [id for id in others if tokenizer.token_text(id)[-1:] in {'"', "]", "}", ">"}]
        if hurries:
            others, closing = quickest(tokenizer, others, set(text)), []
        id = rng.choice(closing if closing and rng.random() < 0.5 else others)
        assert state.accept(id)
        ids.append(id)
    return ids, False


def quickest(tokenizer: Tokenizer, choices: list[int], named: set[str]) -> list[int]:
    """Those of the choices that lead to an end: what closes the string, list or object, else the characters that the
    grammar names, which a pattern may wait for."""
    inside_string = len(choices) > tokenizer.vocab_size // 2
    texts = {tokenizer.token_text(id): id for id in choices}
    for closer in ('"',) if inside_string else ("}", "]", '"'):
        if closer in texts:
            return [texts[closer]]
    return [id for text, id in texts.items() if text in named] or choices
